"""Has the model answer validation rows during a look, and leaves the training as it was.

Nothing is drawn by chance, gradients are off, and the model is back in training mode afterwards. A CPU keeps the layout
of 4-bit weights that training multiplies with (`base_model.keep_training_layout`). With several ranks each answers its
share with the copy of the model that it has; they meet before and after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from shared.contract.answer_scores import NothingAsked, asked_and_answer, score
from shared.contract.generation import Question, Sampling
from shared.contract.spec import AnswerMeasure, AttemptSpec, GeneratedAnswers, Training
from shared.errors import TunepoolError
from worker.train.answering import Answer, ModelRunner
from worker.train.batched_answers import Batcher
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code
from worker.train.ranks import Ranks
from worker.train.reasoning import without_history
from worker.train.rendering import read_time
from worker.train.reporting import Reporter
from worker.train.system_text import merged

ROWS_AT_ONCE: Final = 16
_NO_LIMIT: Final = 1 << 24  # tokens: the model's own context is the limit


class _Over(Exception):
    """No error: the time of a look is over, or a stop was asked for."""


@dataclass(frozen=True)
class Scores:
    """What came of a look: means by measure over `answered` rows. `whole`: all were answered in time."""

    means: dict[AnswerMeasure, float]
    answered: int
    whole: bool


@dataclass
class AnswerLook:
    """Answers rows and measures the answers against the rows' own.

    Attributes:
        answers: of this rank's rows, none of them begun, each with its reference.
    """

    wanted: GeneratedAnswers
    answers: list[tuple[Answer, str]]
    batcher: Batcher
    reporter: Reporter
    ranks: Ranks
    clock: Callable[[], float] = time.monotonic
    _off: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls, spec: AttemptSpec, model: Any, tokenizer: Any, *, reporter: Reporter, ranks: Ranks
    ) -> AnswerLook | None:
        """None: no answers are asked for. Rows that ask nothing, or have no answer of their own, are passed over."""
        wanted = spec.job.training.eval.generate
        if wanted is None or spec.validation_file is None:
            return None
        speaker = ModelRunner(
            model,
            tokenizer,
            answer_tokens=wanted.max_tokens,
            context_tokens=_NO_LIMIT,
            now=read_time(spec.job.training.template_time),  # that of its rows
        )
        asked = list(islice(_asked(spec, speaker), wanted.rows))
        if not asked:
            reporter.say("No validation row can be answered: they ask nothing, or have no answer.", level="warn")
        return cls(
            wanted=wanted,
            answers=asked[ranks.rank :: ranks.world],
            batcher=Batcher(model, pad_id=tokenizer.pad_token_id, at_once=ROWS_AT_ONCE),
            reporter=reporter,
            ranks=ranks,
        )

    def look(self, model: Any, *, should_stop: Callable[[], bool]) -> Scores | None:
        """The scores of all ranks' rows; None if a stop was asked for meanwhile, or nothing was answered."""
        # Ranks agree on a stop, so all must ask at the same places: several of them ask at the end alone.
        stops = should_stop if self.ranks.world == 1 else lambda: False
        over: list[tuple[Answer, str]] = []
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self._answer(model, over, stops=stops)
        finally:
            model.train()
        scores = self._summed(over)
        return None if should_stop() or not scores.answered else scores

    def _answer(self, model: Any, over: list[tuple[Answer, str]], *, stops: Callable[[], bool]) -> None:
        """Answers into `over` as they come, until all have, or the time is over."""
        if self._off:
            return
        until = self.clock() + self.wanted.max_seconds

        def alive() -> None:
            self.reporter.alive("validation")
            if self.clock() > until or stops():
                raise _Over

        begun = [answer.begun_anew() for answer, _ in self.answers]
        references = {answer.number: reference for answer, reference in self.answers}
        try:
            for answer in self.batcher.answer(model, begun, alive=alive):
                over.append((answer, references[answer.number]))
        except _Over:
            if not stops():
                self._say(f"{len(over)} of {len(begun)} rows were answered within {self.wanted.max_seconds} seconds")
        except MAY_MEAN_MEMORY as error:
            if out_of_memory_code(error) is None:
                raise
            self._off = True
            self._say("Memory does not suffice for one answer, so none is looked at any more")

    def _say(self, what: str) -> None:
        self.reporter.say(f"{what}; this look chooses no checkpoint by its answers.", level="warn")

    def _summed(self, over: Sequence[tuple[Answer, str]]) -> Scores:
        values = {
            measure: [
                value for answer, reference in over if (value := score(measure, answer.text, reference)) is not None
            ]
            for measure in self.wanted.measures
        }
        figures = [figure for some in values.values() for figure in (sum(some), len(some))]
        asked, answered, *sums = self.ranks.summed(len(self.answers), len(over), *figures)
        means = {
            measure: sums[2 * place] / sums[2 * place + 1]
            for place, measure in enumerate(values)
            if sums[2 * place + 1]
        }
        return Scores(means=means, answered=int(answered), whole=answered == asked)


def _asked(spec: AttemptSpec, speaker: ModelRunner) -> Iterator[tuple[Answer, str]]:
    """The rows of the validation file that can be answered, in their order; tokens are made here, once."""
    with Path(spec.validation_file or "").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                parts = asked_and_answer(spec.job.data.format, record := json.loads(line))
                if not (parts["reference"] or "").strip():
                    continue
                question = Question(
                    number=number,
                    messages=_messages(parts.get("messages"), spec.job.training),
                    tools=record.get("tools"),
                    text=parts.get("text"),
                    sampling=Sampling(temperature=0.0, seed=0),
                )
                yield speaker.begin(question)[0], parts["reference"]
            except (NothingAsked, TunepoolError):  # a prompt as long as the context, a template that fails on it
                continue


def _messages(messages: Any, training: Training) -> Any:
    """As the trainer renders them."""
    if messages is None:
        return None
    if training.drop_history_reasoning:
        messages = without_history(messages)
    return merged(messages)[0] if training.system_prompt == "merge" else messages
