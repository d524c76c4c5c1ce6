"""Answers items and predicts references, subject by subject: `python -m worker.train.evaluate SPEC OUT`.

Or `--handover N` (shared/contract/handover.py). One base stays in memory, its adapters take turns on it.
`OUT/answers.jsonl` gets a line as soon as an item is done, so that whoever goes on later asks no item again. Exit codes
and `OUT/events.jsonl` are the trainer's.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from shared.contract.evaluation_run import (
    ANSWER_CHARACTERS,
    EvaluationSpec,
    ItemAnswer,
    ItemAsked,
    ItemFault,
    SubjectAsked,
    storable,
)
from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.contract.generation import Question, Sampling
from shared.contract.spec import DataFacts, Format, Training
from shared.errors import Invalid, TunepoolError
from worker.train import resident
from worker.train.answering import Answer, ModelRunner
from worker.train.batched_answers import Batcher
from worker.train.data import RowReader, TokenRow
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code
from worker.train.reporting import Reporter
from worker.train.resident import ResidentModel
from worker.train.started_ahead import work_of
from worker.train.tokenizer import generation_ends

# Logits of so many positions are turned into float32 together: 160 MB with a vocabulary of 150,000.
POSITIONS_AT_ONCE: Final = 256
WINDOWS: Final = 8  # items that are read together, in batches: the longer they are, the more alike are rows of a batch

Write = Callable[[ItemAnswer], None]


class References:
    """Turns references into tokens as training does, and measures how well a model predicts them."""

    def __init__(self, tokenizer: Any, *, base: Path, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._own_template = tokenizer.chat_template
        self._ends = generation_ends(tokenizer, base)
        self._readers: dict[tuple[Format, str | None], RowReader] = {}

    def tokens(self, item: ItemAsked, *, template: str | None) -> TokenRow | None:
        """The row with the reference labelled; None: it has no reference. Raises Invalid: the template fails on it."""
        if item.record is None or item.format is None:
            return None
        (taken,) = self._reader(item.format, template).take([item.record])
        if isinstance(taken, Invalid):
            raise taken
        if taken.whole is None or not taken.whole.labelled_tokens:
            return None
        assert isinstance(taken.whole, TokenRow), "items are supervised rows"
        if taken.whole.tokens > self._context:
            raise Invalid(
                f"Prompt and reference have {taken.whole.tokens} tokens; this model's context has {self._context}.",
                code="context_length_exceeded",
            )
        return taken.whole

    def _reader(self, format_: Format, template: str | None) -> RowReader:
        self._tokenizer.chat_template = template or self._own_template
        key = format_, template
        if key not in self._readers:
            training = Training(train_on="last_assistant", max_length=max(8, self._context))
            facts = DataFacts(format=format_, train_rows=1)
            self._readers[key] = RowReader(self._tokenizer, facts=facts, training=training, ends=self._ends)
        return self._readers[key]


@torch.inference_mode()
def predicted(model: Any, row: TokenRow) -> tuple[float, int, int]:
    """(mean negative logarithm per labelled token, labelled tokens, how many of them were the likeliest)."""
    ids = torch.from_numpy(row.ids.astype("int64")).to(model.device)
    places = torch.from_numpy(row.labelled.nonzero()[0]).to(model.device)
    output = model(input_ids=ids[None], use_cache=False).logits[0]
    total, correct = 0.0, 0
    for some in places.split(POSITIONS_AT_ONCE):
        logits = output[some - 1].float()
        wanted = ids[some]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        correct += int((logits.argmax(dim=-1) == wanted).sum())
    return total / len(places), len(places), correct


@dataclass
class ItemInProgress:
    """An item on its way: what is known of it, and its answer once it is being made."""

    done: dict[str, Any]
    answer: Answer | None = None
    prompt_tokens: int | None = None

    def fail(self, error: BaseException) -> None:
        """Note why there is no answer. An error that says that memory ran out is raised again."""
        if isinstance(error, TunepoolError):
            self.done["error"] = ItemFault(code=error.code, message=storable(error.message)[:1000])
            return
        if out_of_memory_code(error) is not None:
            raise error
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        self.done["error"] = ItemFault(code="generation_failed", message=f"The model failed on this item: {last}")

    def take(self, answer: Answer) -> ItemAnswer:
        """The line of an item whose answer is over."""
        self.done |= {
            "answer": storable(answer.text)[:ANSWER_CHARACTERS],
            "finish_reason": answer.reason,
            "prompt_tokens": self.prompt_tokens,
            "tokens": answer.tokens,
            "seconds": answer.seconds,
        }
        return ItemAnswer(**self.done)


class Examiner:
    """Puts items to subjects, one subject after the other."""

    def __init__(self, spec: EvaluationSpec, base: Any, tokenizer: Any) -> None:
        self._spec = spec
        self._batcher = Batcher(base, pad_id=tokenizer.pad_token_id, at_once=spec.generation.at_once)
        self._model = ResidentModel(base, kept=max(1, len(spec.subjects)))
        self._speaker = ModelRunner(
            base, tokenizer, answer_tokens=spec.generation.max_tokens, context_tokens=spec.context_tokens
        )
        self._references = References(tokenizer, base=Path(spec.base_model_path), context=self._speaker.context)

    @torch.inference_mode()
    def examine(self, write: Write) -> None:
        """Every item of every subject. Raises the error of a subject that cannot be loaded."""
        for subject in self._spec.subjects:
            if subject.adapter is not None:
                self._model.need(subject.adapter, Path(subject.adapter_path or ""))
            with self._model.speaking(subject.adapter, 1.0) as model:
                asked = items(Path(self._spec.items_path), of=subject.place)
                while some := list(itertools.islice(asked, WINDOWS * self._batcher.at_once)):
                    self._examine(model, some, subject, write)

    def _examine(self, model: Any, some: Sequence[ItemAsked], subject: SubjectAsked, write: Write) -> None:
        """Some items: what needs no generation is written at once, the others as their answers end."""
        sheets = [self._begun(model, item, subject, place) for place, item in enumerate(some)]
        for sheet in sheets:
            if sheet.answer is None:
                write(ItemAnswer(**sheet.done))
        try:
            answers = [sheet.answer for sheet in sheets if sheet.answer is not None]
            for answer in self._batcher.answer(model, answers):
                sheets[answer.number].answer = None
                write(sheets[answer.number].take(answer))
        except MAY_MEAN_MEMORY as error:
            if out_of_memory_code(error) is not None:
                raise
            for sheet in sheets:  # one that fails must not take its company with it
                if sheet.answer is not None:
                    write(self._by_itself(model, sheet, sheet.answer))

    def _by_itself(self, model: Any, sheet: ItemInProgress, answer: Answer) -> ItemAnswer:
        try:
            return next(sheet.take(over) for over in self._batcher.answer(model, [answer.begun_anew()]))
        except MAY_MEAN_MEMORY as error:
            sheet.fail(error)
        return ItemAnswer(**sheet.done)

    def _begun(self, model: Any, item: ItemAsked, subject: SubjectAsked, place: int) -> ItemInProgress:
        sheet = ItemInProgress({"part": item.part, "item": item.item, "subject": subject.place})
        try:
            if self._spec.likelihood:
                sheet.done |= self._likelihood(model, item, subject)
            if self._spec.answers and (item.messages is not None or item.text is not None):
                sheet.answer, sheet.prompt_tokens = self._speaker.begin(self._question(item, subject, place))
        except (TunepoolError, *MAY_MEAN_MEMORY) as error:
            sheet.fail(error)
        return sheet

    def _likelihood(self, model: Any, item: ItemAsked, subject: SubjectAsked) -> dict[str, Any]:
        row = self._references.tokens(item, template=subject.chat_template)
        if row is None:
            return {}
        loss, tokens, correct = predicted(model, row)
        if not math.isfinite(loss):
            raise Invalid("The model's loss on this item is no finite number.", code="loss_not_finite")
        return {"loss": loss, "loss_tokens": tokens, "correct_tokens": correct}

    def _question(self, item: ItemAsked, subject: SubjectAsked, place: int) -> Question:
        settings = self._spec.generation
        # The seed goes with the item, not with the order in which items are asked.
        seed = (settings.seed + item.item) % 2**31
        return Question(
            number=place,
            messages=item.messages,
            tools=item.tools,
            text=item.text,
            chat_template=subject.chat_template,
            sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed, stop=settings.stop),
        )


def items(file: Path, *, of: int) -> Iterator[ItemAsked]:
    """The items that a subject has not answered yet."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            item = ItemAsked.model_validate(json.loads(line))
            if of in item.subjects:
                yield item


def main(spec_file: Path, out: Path) -> int:
    """Examine all subjects; returns one of the trainer's exit codes."""
    out.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(out / "events.jsonl", clock=time.time)
    spec = EvaluationSpec.model_validate_json(spec_file.read_bytes())
    resident.begin(spec)
    kept = os.open(out / "answers.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _examine(spec, lambda answer: _append(kept, answer))
    except TunepoolError as error:
        reporter.write(Failed, code=error.code, message=error.message, param=error.param)
        return EXIT_USER_FAULT
    except MAY_MEAN_MEMORY as error:
        code = out_of_memory_code(error)
        if code is None:
            raise
        reporter.write(Failed, code=code, message="The memory did not suffice for this evaluation.")
        return EXIT_OUT_OF_MEMORY
    finally:
        os.close(kept)
    return EXIT_DONE


def _append(file: int, answer: ItemAnswer) -> None:
    """One write, so that a reader never sees a line without its end but at the end of the file."""
    line = answer.model_dump_json().encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]


def _examine(spec: EvaluationSpec, write: Write) -> None:
    tokenizer, base = resident.load(spec)
    Examiner(spec, base, tokenizer).examine(write)


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(*work_of(sys.argv[1:])))
