"""Jobs that train in turn on one base in memory: `python -m worker.train.together COTRAINING OUT`; docs/trainer.md.

One process, the base once, an adapter a job. A turn is a whole optimizer step with its look and its checkpoint. Each
job, or trainee, has its own OUT, random generators, optimizer, schedule and stop file, and gets bit for bit what it
would get alone. Each has its own end, except when memory runs out: then nobody knows who fits.

Exit codes: 0 every trainee has come to an end of its own, 3 these cannot train together, 4 out of memory, 5 all were
stopped on request. What became of a trainee stands in `OUT/JOB_ID/end.json`.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from shared.contract.cotraining import END_FILE, CotrainingSpec, TraineeEnd, reason_not_together
from shared.contract.events import (
    EXIT_DONE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_FAULT,
    Failed,
)
from shared.contract.spec import AttemptSpec
from shared.errors import Invalid
from worker.train.__main__ import load_base, prepare, publish, report_end
from worker.train.loop import turns
from worker.train.memory import MemoryReserve, Peaks, device_bytes_in_use, limit_memory, peak_memory
from worker.train.random_state import RandomState
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter, TraineeReporter
from worker.train.shared_base import tree_over
from worker.train.stack_faults import refused_for_good
from worker.train.stopping import StopRequest, TraineeStop

EXIT_CRASHED: Final = 1


def main(spec_file: Path, out: Path) -> int:
    """Train every trainee to its own end. Returns the exit code of the process."""
    out.mkdir(parents=True, exist_ok=True)
    cotraining = CotrainingSpec.model_validate_json(spec_file.read_bytes())
    if (reason := reason_not_together(cotraining.trainees)) is not None:
        refused = Invalid(f"These jobs cannot train together: {reason}.", code="cannot_train_together")
        Reporter(out / "events.jsonl", clock=time.time).write(Failed, code=refused.code, message=refused.message)
        return EXIT_USER_FAULT
    stop = StopRequest(out, ranks=Ranks()).listen()
    first = cotraining.trainees[0]
    before = device_bytes_in_use(first)
    torch.set_num_threads(first.cpu_threads)
    limit_memory(first.model_copy(update={"memory_limit_bytes": cotraining.memory_limit_bytes}))
    together = Together(stop=stop, before=before, peaks=lambda: peak_memory(first, before=before))
    for spec in cotraining.trainees:
        together.admit(spec, out=Path(cotraining.outs.get(spec.job_id, out / spec.job_id)))
    return together.train()


@dataclass
class Trainee:
    """One of the jobs, and how far it is."""

    spec: AttemptSpec
    out: Path
    reporter: TraineeReporter
    stop: TraineeStop
    life: Iterator[None]  # a pause after each turn
    random: RandomState
    clock: Callable[[], float]
    begun: bool = False
    device_seconds: float = 0.0

    def take_turn(self) -> bool:
        """Go on to the next pause, with this trainee's own random numbers. False: it is done."""
        began = self.clock()
        self.begun = True
        self.random.put_back()
        try:
            next(self.life)
        except StopIteration:
            return False
        finally:
            self.random = RandomState.taken()
            self.device_seconds += self.clock() - began
        return True


@dataclass
class Together:
    """The trainees that live, and the order in which they have the device."""

    stop: StopRequest
    before: int | None  # bytes of the device that others held when the process began
    peaks: Callable[[], Peaks]
    trainees: list[Trainee] = field(default_factory=list)
    reserve: MemoryReserve = field(default_factory=MemoryReserve)
    base: Any = None
    clock: Callable[[], float] = time.monotonic

    def admit(self, spec: AttemptSpec, *, out: Path) -> None:
        """A trainee that begins with its first turn."""
        out.mkdir(parents=True, exist_ok=True)
        (out / END_FILE).unlink(missing_ok=True)  # of an attempt before
        reporter = TraineeReporter(
            out / "events.jsonl", waiting=lambda: [trainee.reporter for trainee in self.trainees], clock=time.time
        )
        stop = TraineeStop(out, everybody=self.stop)
        life = self._life(spec, out=out, reporter=reporter, stop=stop)
        self.trainees.append(
            Trainee(spec, out, reporter, stop, life=life, random=RandomState.taken(), clock=self.clock)
        )

    def _life(self, spec: AttemptSpec, *, out: Path, reporter: Reporter, stop: StopRequest) -> Iterator[None]:
        """The acts of one attempt, with pauses: preparation, every step, and the product."""
        run, tokenizer = prepare(
            spec, out=out, reporter=reporter, stop=stop, ranks=Ranks(), load_base=lambda _: tree_over(self.base)
        )
        yield
        yield from turns(run)
        publish(run, tokenizer=tokenizer, before=self.before)

    def train(self) -> int:
        """Give each trainee its turns until none lives; returns the exit code of the process."""
        ends = self._load()
        while self.trainees:
            for trainee in tuple(self.trainees):
                code = self._turn_of(trainee)
                if code is not None:
                    ends.add(code)
                if code == EXIT_OUT_OF_MEMORY:
                    self._part()
                    break
        if EXIT_OUT_OF_MEMORY in ends:
            return EXIT_OUT_OF_MEMORY
        return EXIT_STOPPED if ends == {EXIT_STOPPED} and self.stop else EXIT_DONE

    def _load(self) -> set[int]:
        """Load the base for all. A failure ends every trainee; their exit codes are returned then."""
        try:
            with contextlib.ExitStack() as signs:
                for trainee in self.trainees:
                    signs.enter_context(trainee.reporter.working("loading"))
                with refused_for_good("loading the base model"):
                    self.base = load_base(self.trainees[0].spec)
            return set()
        except Exception as error:  # noqa: BLE001 -- each trainee is told, as each would be alone
            codes = {trainee.spec.job_id: self._code_of(error, trainee) for trainee in self.trainees}
        for trainee in tuple(self.trainees):
            self._end(trainee, codes[trainee.spec.job_id])
        return set(codes.values())

    def _turn_of(self, trainee: Trainee) -> int | None:
        """One turn of it. Its exit code if that was the last one."""
        try:
            if trainee.take_turn():
                return None
            code = EXIT_DONE
        except Exception as error:  # noqa: BLE001 -- a trainee that crashes takes nobody along
            code = self._code_of(error, trainee)
        self._end(trainee, code)  # outside the handler: only now are the tensors of a failed pass let go
        return code

    def _code_of(self, error: Exception, trainee: Trainee) -> int:
        """Tell why it ends as a run alone would; returns its exit code."""
        code = report_end(error, reporter=trainee.reporter, reserve=self.reserve, peaks=self.peaks)
        if code is not None:
            return code
        traceback.print_exception(error)
        self.reserve = MemoryReserve()
        return EXIT_CRASHED

    def _end(self, trainee: Trainee, code: int) -> None:
        """Write down how it ended, and let its memory go."""
        self.trainees.remove(trainee)
        end = TraineeEnd(code=code, device_seconds=trainee.device_seconds)
        unfinished = trainee.out / f"{END_FILE}.tmp"
        unfinished.write_text(end.model_dump_json(), encoding="utf-8")
        unfinished.rename(trainee.out / END_FILE)
        trainee.life = iter(())  # the run, with its adapter and its optimizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _part(self) -> None:
        """Memory is out: the others save what they have done and end as stopped, each to be trained alone."""
        for trainee in tuple(self.trainees):
            trainee.stop.ask()
            if trainee.begun:
                self._turn_of(trainee)
            else:
                self._end(trainee, EXIT_STOPPED)


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
