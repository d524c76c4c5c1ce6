"""The CPU lane's evaluations: read the items, have programs answer, keep and score each answer, make the report.

A program answers for all subjects on one base; others have a program of their own after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from shared.chores import evaluations
from shared.chores import table as chores
from shared.chores.evaluations import EVALUATION, AnswerKey, EvaluationClaim
from shared.contract.evaluation_run import (
    ANSWER_CHARACTERS,
    ANSWER_LINE_BYTES,
    EvaluationSpec,
    ItemAnswer,
    StoredAnswer,
    SubjectAsked,
    storable,
)
from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT
from shared.contract.generation import Target
from shared.contract.passes import device_kind
from shared.contract.spec import Quantization
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.products.adapters import StoredFile
from shared.rows import figures
from shared.rows.evaluation_items import EvaluationItem
from shared.rows.measuring import Scorer, needs_answers, needs_likelihood
from worker import base_models
from worker.chores import evaluation_device, reading_items
from worker.chores import run_program as programs
from worker.chores.evaluation_device import EvaluationDeferred
from worker.chores.evaluation_groups import AnswerTail, Group, groups
from worker.chores.evaluation_seat import EvaluationSeat
from worker.chores.playground_program import HeldWeights
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.program import hostile_folder, workdir
from worker.program.launcher import Exit
from worker.program.spare import Spare, within_walls
from worker.program.workdir import Workdir

log = structlog.get_logger()

KEPT_AT_ONCE: Final = 50  # answers in one statement
# Within the first the largest base is loaded from a slow disk; the second is a large model's pace on a processor, when
# answers come eight together and none before the last of them.
LOADING_SECONDS: Final = 1800.0
TOKEN_SECONDS: Final = 5.0


class TurnOver(EvaluationDeferred):
    """It has had its time, and other long work waits."""

    code = "others_first"
    seconds = 1.0  # within which the other work is taken, which the order of age would not give its turn


class ProgramBroke(TunepoolError):
    """The program ended, and not by the user's fault."""

    code = "trainer_crashed"


def evaluate_next(host: Host, seat: EvaluationSeat | None = None) -> bool:
    """Work on one evaluation, if any waits and long work may begin. False: none does.

    `seat`: of this process; its spare is the program, if it can be.
    """
    claim = host.claim(
        partial(
            evaluations.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            turn=host.turn("evaluation"),
        )
    )
    if claim is None:
        return False
    if seat is not None:
        host.flags.rise(seat.number)  # the next one is for anybody
    host.served["evaluation"] = claim.project_id
    log.info("evaluation.claimed", evaluation_id=claim.lease.id, attempt=claim.lease.attempt)
    return under_lease(host, EVALUATION, claim.lease, partial(_evaluate, host, claim, seat))


def _evaluate(host: Host, claim: EvaluationClaim, seat: EvaluationSeat | None, watch: LeaseWatch) -> None:
    """Write the report, or why there is none. Raises Stopped."""
    lease = claim.lease
    try:
        _Sitting(host, claim, watch, seat).run()
    except EvaluationDeferred as error:
        code, message, seconds = error.code, error.message, error.seconds
        log.info("evaluation.postponed", evaluation_id=lease.id, code=code)
        host.write_in_the_end(lambda s: evaluations.postpone(s, lease, code=code, message=message, seconds=seconds))
    except (Unavailable, ProgramBroke) as error:
        code, message = error.code, error.message
        host.write_in_the_end(lambda s: evaluations.give_back(s, lease, code=code, message=message[:500]))
    except TunepoolError as error:
        code, message, param = error.code, error.message, error.param
        host.write_in_the_end(lambda s: evaluations.fail(s, lease, code=code, message=message, param=param))


class _Sitting:
    """One attempt at an evaluation."""

    def __init__(self, host: Host, claim: EvaluationClaim, watch: LeaseWatch, seat: EvaluationSeat | None) -> None:
        self.host, self.claim, self.watch, self.seat = host, claim, watch, seat
        self.lease, self.request = claim.lease, claim.request
        self.scorer = Scorer(claim.request.measures)
        self.done: set[AnswerKey] = set()
        self.items: dict[tuple[str, int], EvaluationItem] = {}

    def run(self) -> None:
        """Raises Stopped, TunepoolError."""
        self.host.write(lambda s: evaluations.must_be_there(s, self.claim))
        folder = workdir.make(self.host.work, self.lease)
        items = reading_items.read(self.host, self.claim, folder, interrupt=self.watch.check)
        self.items = {(item.part, item.number): item for item in items}
        device = evaluation_device.chosen(self.host, self.claim.targets) if self.claim.targets else None
        name = "CPU" if device is None else device.name
        self.must_hold(
            self.host.write_in_the_end(lambda s: evaluations.begin(s, self.lease, items=len(self.items), device=name))
        )
        self.done = self.host.write_in_the_end(lambda s: evaluations.answered(s, self.lease.id))
        self.keep_faulty()
        if device is None:
            self.keep_given()
        else:
            self.ask_programs(folder, device)
        self.report()

    def must_hold(self, held: bool) -> None:
        if not held:
            raise programs.Stopped

    # --- items ------------------------------------------------------------------------------------------------------

    def left(self, place: int) -> list[EvaluationItem]:
        """Items that a subject has not answered."""
        return [item for (part, number), item in self.items.items() if (part, number, place) not in self.done]

    def keep_faulty(self) -> None:
        """Rows that are no items have an answer at once, for every subject: why there is none."""
        faulty = [
            ItemAnswer(part=item.part, item=item.number, subject=place, error=item.fault)
            for item in self.items.values()
            if item.fault is not None
            for place in range(len(self.request.subjects))
        ]
        self.keep(faulty)

    def keep_given(self) -> None:
        """Answers that came with their items."""
        given = [
            ItemAnswer(part=item.part, item=item.number, subject=0, answer=item.given[:ANSWER_CHARACTERS])
            for item in self.items.values()
            if item.given is not None
        ]
        self.keep(given)

    # --- programs ---------------------------------------------------------------------------------------------------

    def ask_programs(self, folder: Workdir, device: FoundDevice) -> None:
        """Have whatever is left answered. A spare is the program of the first group; its walls leave it its own folder.

        Raises StillAlive.
        """
        ahead = first = None if self.seat is None else self.seat.give(device)
        try:
            for group in groups(self.claim.targets, device):
                if any(self.left(place) for place in group.places):
                    self.answer(folder if ahead is None else ahead.folder, group, device, first)
                    first = None
        finally:
            if ahead is not None:
                ahead.remove()

    def answer(self, folder: Workdir, group: Group, device: FoundDevice, ahead: Spare | None) -> None:
        """Have a program answer whatever is left for a group."""
        model = self.stage(folder, group, device, ahead)
        workdir.hand_over(folder, uid=self.host.trainer_uid)
        attending = _Attending(self, AnswerTail(folder.out / "answers.jsonl", line_bytes=ANSWER_LINE_BYTES), device)
        ended = programs.run(
            self.host,
            self.host.settings.evaluator,
            lease=self.lease,
            place=folder,
            watch=attending,
            environment=partial(evaluation_device.variables, self.host, device),
            reads=(model,),
            ahead=ahead,
        )
        attending.look(last=True)
        if ended.code != EXIT_DONE or any(self.left(place) for place in group.places):
            self.refuse(folder, ended, device)

    def stage(self, folder: Workdir, group: Group, device: FoundDevice, ahead: Spare | None) -> Path:
        """Bring base and adapters here and write what the program reads; returns where the base lies."""
        model = self.base(folder, group.target)
        if ahead is not None and ahead.serves and not group.target.whole:
            model, _ = within_walls(ahead, model, self.host.isolation)
        subjects = [self.subject(folder, place) for place in group.places]
        file = folder.data / f"items-{group.places[0]}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{line}\n" for line in self.lines(group))
        weights = HeldWeights.of(group.target, device)
        spec = EvaluationSpec(
            base_model_path=str(model),
            quantization=Quantization.model_validate_json(weights.quantization) if weights.quantization else None,
            dtype=weights.dtype,
            device=device_kind(device.kind),
            cpu_threads=evaluation_device.threads(self.host, device),
            context_tokens=self.host.settings.playground_context_tokens,
            subjects=subjects,
            items_path=str(file),
            generation=self.request.timed_generation(),
            likelihood=needs_likelihood(self.request.measures),
            answers=needs_answers(self.request.measures),
        )
        folder.spec.write_text(spec.model_dump_json(), encoding="utf-8")
        return model

    def lines(self, group: Group) -> Iterator[str]:
        for (part, number), item in self.items.items():
            places = [place for place in group.places if (part, number, place) not in self.done]
            if places:
                yield item.asked(places).model_dump_json()

    def base(self, folder: Workdir, target: Target) -> Path:
        if target.whole:
            return self.adapter(folder, target)
        entry = self.host.catalogue().entry(target.base.name)
        if entry.ref.revision != target.base.revision:
            raise Invalid(
                f"The catalogue now has revision {entry.ref.revision} of {entry.ref.name}; a subject stands on "
                f"{target.base.revision}. Ask your administrator to offer that revision again.",
                param="subjects",
                code="base_model_changed",
            )
        settings = self.host.settings
        return base_models.ensure(
            entry, cache=settings.cache, interrupt=self.watch.check, user=folder.root, most=settings.cache_bytes
        )

    def subject(self, folder: Workdir, place: int) -> SubjectAsked:
        target = self.claim.targets[place]
        if target.adapter is None or target.whole:
            return SubjectAsked(place=place, chat_template=target.chat_template)
        files = self.adapter(folder, target)
        return SubjectAsked(
            place=place, adapter=target.adapter, adapter_path=str(files), chat_template=target.chat_template
        )

    def adapter(self, folder: Workdir, target: Target) -> Path:
        assert target.adapter is not None
        place = folder.data / hostile_folder.checked(target.adapter)
        if not place.is_dir():
            files = [StoredFile(file.name, file.bytes, file.sha256, file.key) for file in target.files]
            workdir.stage_files(self.host.store, files, place, interrupt=self.watch.check)
        return place

    def refuse(self, folder: Workdir, ended: Exit, device: FoundDevice) -> None:
        """The program did not answer everything: its own words, or what its end means."""
        fault = programs.users_fault(folder, ended)
        if ended.code == EXIT_USER_FAULT and fault is not None:
            raise Invalid(fault.message, param=fault.param, code=fault.code)
        if device.kind != "cpu" and evaluation_device.wanted(self.host, device):
            raise EvaluationDeferred("A training has taken the device. The evaluation goes on where it was.")
        if ended.code == EXIT_OUT_OF_MEMORY:
            raise ProgramBroke("Out of memory: the base model and one answer did not fit.", code="host_oom")
        last = (ended.last_words.strip().splitlines() or ["-"])[-1]
        log.error("evaluation.crashed", evaluation_id=self.lease.id, exit_code=ended.code)
        raise ProgramBroke(f"The program ended with code {ended.code}: {storable(last)}")

    # --- answers ----------------------------------------------------------------------------------------------------

    def keep(self, answers: list[ItemAnswer]) -> None:
        """Score and store answers that were asked for; anything else that a program says is passed over."""
        wanted = {
            key: answer
            for answer in answers
            if (key := (answer.part, answer.item, answer.subject)) not in self.done
            and (answer.part, answer.item) in self.items
            and answer.subject < len(self.request.subjects)
        }
        kept = [self.scored(answer) for answer in wanted.values()]
        for begun in range(0, len(kept), KEPT_AT_ONCE):
            some = kept[begun : begun + KEPT_AT_ONCE]
            self.must_hold(self.host.write_in_the_end(partial(evaluations.keep, lease=self.lease, kept=some)))
            self.done |= {(answer.part, answer.item, answer.subject) for answer in some}
            self.watch.check()

    def scored(self, answer: ItemAnswer) -> StoredAnswer:
        item = self.items[answer.part, answer.item]
        scores, problems = self.scorer.scores(item, answer)
        return StoredAnswer(
            **dict(answer),
            line=item.line,
            prompt=item.prompt,
            reference=None if item.reference is None else storable(item.reference),
            slices=item.slices(self.request.slices),
            scores=scores,
            problems={name: storable(problem) for name, problem in problems.items()},
            **item.kept(),
        )

    def report(self) -> None:
        answers = self.host.write_in_the_end(lambda s: evaluations.answers(s, self.lease.id))
        made = figures.report(self.request, answers, interrupt=self.watch.check)
        ended = self.host.write_in_the_end(lambda s: evaluations.finish(s, self.lease, made))
        log.info("evaluation.ended", evaluation_id=self.lease.id, reported=ended)


def silent_seconds(max_tokens: int) -> float:
    """How long a program may bring no answer: it loads, or writes one that is as long as it may be."""
    return LOADING_SECONDS + max_tokens * TOKEN_SECONDS


class _Attending(LeaseWatch):
    """While a program works: keep its answers, and leave when others want the device or the turn is over."""

    def __init__(self, sitting: _Sitting, tail: AnswerTail, device: FoundDevice) -> None:
        super().__init__(sitting.host, EVALUATION, sitting.lease)
        self._sitting, self._tail, self._device = sitting, tail, device
        self._settings = sitting.host.settings
        self._looked = time.monotonic()
        self._first: float | None = None  # when an answer came first: loading is no part of the turn
        self._heard = self._looked
        self._silence = silent_seconds(sitting.request.generation.max_tokens)

    def check(self) -> None:
        """Raises Stopped, MakesRoom, TooSlow."""
        super().check()
        if time.monotonic() - self._looked >= self._settings.control_seconds:
            self._looked = time.monotonic()
            self.look()
            if self._looked - self._heard > self._silence:
                raise programs.TooSlow(f"No answer came for {self._silence:.0f} seconds. Ask for shorter ones.")
            self._make_room()

    def look(self, *, last: bool = False) -> None:
        """Keep what has come; with `last` all there is."""
        while True:
            before = self._tail.offset
            answers = list(self._tail.answers())
            self._sitting.keep(answers)
            if answers:
                self._heard = time.monotonic()
            if answers and self._first is None:
                self._first = time.monotonic()
            if not last or self._tail.offset == before:
                return

    def _make_room(self) -> None:
        if evaluation_device.wanted(self._sitting.host, self._device):
            raise EvaluationDeferred("A training wants the device. The evaluation goes on where it was.")
        # Whoever has answered nothing yet stays, or two could make room for each other for ever.
        late = self._first is not None and time.monotonic() - self._first > self._settings.evaluation_turn_seconds
        if late and self._sitting.host.write(chores.long_work_waits):
            raise TurnOver("Other long work has its turn. The evaluation goes on where it was.")
