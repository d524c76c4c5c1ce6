"""Act three: canonical JSONL rows become token ids with a mask of the tokens that carry loss.

Shapes: T = tokens of one row. The tokenizer's own truncation is never used; a row is cut at the end, after masking.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import Invalid
from shared.spec import DataFacts, Training
from worker.train.chat import ChatTemplate, JsonObject, Span, common_prefix_length, for_template, trained_messages

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRow:
    """One supervised row: what the model reads and which tokens it is taught."""

    ids: Ids  # (T,)
    labelled: Mask  # (T,); the first token of a row predicts from nothing and is never labelled

    @property
    def text_ids(self) -> Ids:
        return self.ids

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def labelled_tokens(self) -> int:
        return int(self.labelled.sum())


@dataclass(frozen=True)
class AnswersRow:
    """A prompt and its answers: chosen and rejected (preference), or one with a label (kto)."""

    prompt_ids: list[int]
    answers: list[list[int]]
    label: bool = True

    @property
    def text_ids(self) -> Ids:
        """The prompt with its first answer."""
        return np.asarray(self.prompt_ids + self.answers[0], dtype=np.int32)

    @property
    def tokens(self) -> int:
        return sum(len(self.prompt_ids) + len(answer) for answer in self.answers)

    @property
    def labelled_tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)


Row = TokenRow | AnswersRow


@dataclass(frozen=True)
class RowSet:
    """The rows of one file that can teach something, and what was lost on the way."""

    rows: list[Any]  # TokenRow, or AnswersRow for preference and kto files
    truncated: int
    dropped: int  # nothing left to learn after the cut, or nothing weighted to begin with


class RowReader:
    """Tokenises the rows of a job's files."""

    def __init__(self, tokenizer: Any, *, facts: DataFacts, training: Training) -> None:
        self._tokenizer = tokenizer
        # The tokenizer proper: what a tokenizer.json may say of cutting and padding is undone here, once.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._specials = frozenset(tokenizer.all_special_ids)
        self._training = training
        self._read: Callable[[JsonObject], Row | None] = {
            "chat": self._chat,
            "prompt_completion": self._prompt_completion,
            "text": self._text,
            "preference": self._preference,
            "kto": self._kto,
        }[facts.format]
        self._template = ChatTemplate(tokenizer) if facts.format in ("chat", "preference", "kto") else None

    def read(self, file: Path) -> RowSet:
        """All rows of `file`.

        Raises:
            Invalid: code `no_trainable_tokens` when no row has a token to learn; codes of the chat template.
        """
        rows: list[Row] = []
        truncated = dropped = 0
        for record in _records(file):
            whole, row = self.take(record)
            truncated += row is not None and row is not whole
            dropped += row is None
            if row is not None:
                rows.append(row)
        if not rows:
            raise Invalid(
                f"No row of the file has a token to learn from: all {dropped} rows are masked or were cut before "
                f"their answer by max_length {self._training.max_length}.",
                code="no_trainable_tokens",
                param="training_file",
            )
        return RowSet(rows=rows, truncated=truncated, dropped=dropped)

    def take(self, record: JsonObject) -> tuple[Row | None, Row | None]:
        """One row as it stands, and what of it is trained: the same row, a shortened one, or None.

        Raises:
            Invalid: codes of the chat template.
        """
        whole = self._read(record)
        return whole, None if whole is None else _cut(whole, self._training.max_length)

    def _chat(self, record: JsonObject) -> TokenRow:
        assert self._template is not None
        messages = [for_template(message) for message in record["messages"]]
        tools = record.get("tools")
        if self._training.train_on == "all":
            return self._labelled(self._template.render(messages, tools=tools), spans=None, special_tokens=False)
        rendered = self._template.render_with_spans(messages, tools=tools)
        trained = trained_messages(record["messages"], self._training)
        spans = [span for span, carries_loss in zip(rendered.spans, trained, strict=True) if carries_loss]
        return self._labelled(rendered.text, spans=spans, special_tokens=False)

    def _prompt_completion(self, record: JsonObject) -> TokenRow:
        prompt, completion = record["prompt"], record["completion"]
        return self._labelled(prompt + completion, spans=[(len(prompt), len(prompt + completion))], special_tokens=True)

    def _text(self, record: JsonObject) -> TokenRow:
        return self._labelled(record["text"], spans=None, special_tokens=True)

    def _preference(self, record: JsonObject) -> AnswersRow | None:
        return self._answers(record, [record["chosen"], record["rejected"]])

    def _kto(self, record: JsonObject) -> AnswersRow | None:
        return self._answers(record, [record["completion"]], label=record["label"])

    def _labelled(self, text: str, *, spans: list[Span] | None, special_tokens: bool) -> TokenRow:
        """Tokens of `text`; those that overlap a span are labelled, all of them when spans is None.

        A text that ends within a span and without an end-of-turn token gets the end token, labelled: a model that is
        never taught to stop does not.
        """
        encoded = self._backend.encode(text, add_special_tokens=special_tokens)
        starts, ends = np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        spans = [(0, len(text))] if spans is None else spans
        labelled = np.zeros(len(starts), dtype=np.bool_)
        for start, end in spans:
            labelled |= (ends > start) & (starts < end) & (ends > starts)
        ids = np.asarray(encoded.ids, dtype=np.int32)
        if spans and spans[-1][1] == len(text) and not self._ends_turn(ids):
            ids = np.append(ids, np.int32(self._tokenizer.eos_token_id))
            labelled = np.append(labelled, True)
        labelled[:1] = False
        return TokenRow(ids=ids, labelled=labelled)

    def _ends_turn(self, ids: Ids) -> bool:
        return self._tokenizer.eos_token_id is None or bool(len(ids) and int(ids[-1]) in self._specials)

    def _answers(self, record: JsonObject, answers: list[JsonObject], *, label: bool = True) -> AnswersRow | None:
        assert self._template is not None
        messages = [for_template(message) for message in record["messages"]]
        tools = record.get("tools")
        prompt = self._ids(self._template.render(messages, tools=tools, prompt_only=True))
        wholes = [self._ids(self._template.render([*messages, for_template(one)], tools=tools)) for one in answers]
        # The answer starts where prompt and whole part ways, which a merge across the boundary can put before its end.
        shared = min(common_prefix_length(prompt, whole) for whole in wholes)
        answers_ids = [self._without_tail(whole[shared:]) for whole in wholes]
        return AnswersRow(prompt_ids=prompt[:shared], answers=answers_ids, label=label) if all(answers_ids) else None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _without_tail(self, answer: list[int]) -> list[int]:
        """Cut what a template writes after the end-of-turn token (a line break), as generation stops before it."""
        tail = next((back for back, token in enumerate(reversed(answer)) if token in self._specials), 0)
        white = not self._tokenizer.decode(answer[len(answer) - tail :]).strip()
        return answer[: len(answer) - tail] if tail and white else answer


def _records(file: Path) -> Iterator[JsonObject]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _cut(row: Row, max_length: int) -> Row | None:
    """`row` itself when it fits; shortened when not; None when nothing to learn is left."""
    if isinstance(row, AnswersRow):
        room = max_length - len(row.prompt_ids)
        if room < 1:
            return None
        if all(len(answer) <= room for answer in row.answers):
            return row
        return AnswersRow(prompt_ids=row.prompt_ids, answers=[one[:room] for one in row.answers], label=row.label)
    cut = row if row.tokens <= max_length else TokenRow(ids=row.ids[:max_length], labelled=row.labelled[:max_length])
    return cut if cut.labelled.any() else None
