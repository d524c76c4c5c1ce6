"""Canonical JSONL rows become token ids with a mask of the tokens that carry loss.

Some rows at a time: first all are rendered, then all encoded. Either has its data in the processor's caches then, which
takes a tenth less time than going to and fro.

Shapes: T = tokens of one row. The tokenizer's own truncation is never used; a row is cut at the end, after masking.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from shared.contract.events import UnwrittenRows
from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from worker.train.added_words import words_of_template
from worker.train.call_ids import are_changed
from worker.train.chat import ChatTemplate, JsonObject
from worker.train.control_tokens import ControlTokens, MarkedRow, PlainText
from worker.train.reasoning import behind_reasoning, without_history
from worker.train.rendering import read_time
from worker.train.system_text import merged
from worker.train.token_spans import Alignment, Ids, Mask, Span
from worker.train.turn_ends import UNKNOWN_PLACE
from worker.train.turns import common_prefix_length
from worker.train.unwritten import (
    PromptLosses,
    RefusedRows,
    call_ids_mapped,
    history_dropped,
    kept_as_text,
    parsed,
)
from worker.train.written import MissingText, lost, numbered, refuse_empty, refuse_lost


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
Messages = list[JsonObject]


class KeptRow(NamedTuple):
    """A row as it stands, its trained part (all, less of it, or None), and the parts that its template left out."""

    whole: Row | None
    kept: Row | None
    lost: list[MissingText]


AT_ONCE: Final = 64  # rows


@dataclass(frozen=True)
class _Text:
    """A supervised row as text; the tokens that overlap a span are taught, all of them when `spans` is None."""

    text: str
    spans: list[Span] | None
    special_tokens: bool = False
    lost: list[MissingText] = field(default_factory=list)
    own: Sequence[int] = ()  # characters that no control token may cover


@dataclass(frozen=True)
class _Answers:
    """A prompt, and the same with each of its answers."""

    prompt: PlainText
    wholes: list[PlainText]
    label: bool
    lost: list[MissingText]


@dataclass(frozen=True)
class RowSet:
    """The rows of one file that can teach something, and what was lost on the way."""

    rows: list[Any]  # TokenRow, or AnswersRow for preference and kto files
    truncated: int
    dropped: int  # nothing left to learn after the cut, or nothing weighted to begin with
    unwritten: list[UnwrittenRows] = field(default_factory=list)


class RowReader:
    """Tokenises the rows of a job's files."""

    def __init__(self, tokenizer: Any, *, facts: DataFacts, training: Training, ends: Sequence[str] = ()) -> None:
        """`ends`: tokens that end a generation of the base model, by its generation_config."""
        self._tokenizer = tokenizer
        self._controls = ControlTokens(tokenizer.backend_tokenizer, (*tokenizer.all_special_tokens, *ends))
        # What a tokenizer.json may say of cutting and padding is undone here, once.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._alignment = Alignment(tokenizer.backend_tokenizer, self._controls)
        self._specials = frozenset((*tokenizer.all_special_ids, *self._controls.ids.values()))
        self._training = training
        formats: dict[str, Callable[[JsonObject], _Text | _Answers]] = {
            "chat": self._chat,
            "prompt_completion": self._prompt_completion,
            "text": self._text,
            "preference": self._preference,
            "kto": self._kto,
        }
        self._rendered = formats[facts.format]
        self._template: ChatTemplate | None = None
        if facts.format in ("chat", "preference", "kto"):
            now = read_time(training.template_time)  # for all rows the same
            self._template = ChatTemplate(tokenizer, self._controls, stops=ends, now=now)

    @property
    def template(self) -> ChatTemplate | None:
        """What renders the rows; None for rows that are read as they are."""
        return self._template

    def read(self, file: Path) -> RowSet:
        """All rows of `file`.

        Raises:
            Invalid: code `no_trainable_tokens` when no row has a token to learn; codes of the chat template, with the
                number of the first row that it cannot write, and how many there are.
        """
        rows, truncated, dropped = list[Row](), 0, 0
        unwritten, refused = PromptLosses(), RefusedRows()
        for number, taken in enumerate(self.take(_records(file)), start=1):
            if isinstance(taken, Invalid):
                refused.add(number, taken)
                continue
            unwritten.add(number, taken.lost)
            truncated += taken.kept is not None and taken.kept is not taken.whole
            dropped += taken.kept is None
            if taken.kept is not None:
                rows.append(taken.kept)
        refused.tell()
        if not rows:
            raise Invalid(
                f"No row of the file has a token to learn from: all {dropped} rows are masked or were cut before "
                f"their answer by max_length {self._training.max_length}.",
                code="no_trainable_tokens",
                param="training_file",
            )
        return RowSet(rows=rows, truncated=truncated, dropped=dropped, unwritten=unwritten.entries())

    def take(self, records: Iterable[JsonObject]) -> Iterator[KeptRow | Invalid]:
        """Each row, or why the chat template cannot write it."""
        left = iter(records)
        while some := [self._render(record) for record in islice(left, AT_ONCE)]:
            yield from [item if isinstance(item, Invalid) else self._encode(item) for item in some]

    def _render(self, record: JsonObject) -> _Text | _Answers | Invalid:
        try:
            return self._rendered(record)
        except Invalid as error:
            return error
        except RecursionError:
            return Invalid("The row nests too deeply.", code="too_deeply_nested", param="training_file")

    def _encode(self, rendered: _Text | _Answers) -> KeptRow | Invalid:
        try:
            whole = self._labelled(rendered) if isinstance(rendered, _Text) else self._answers(rendered)
        except Invalid as error:
            return error
        kept = None if whole is None else _cut(whole, self._training.max_length)
        return KeptRow(whole, kept, rendered.lost)

    # ---- to text

    def _chat(self, record: JsonObject) -> _Text:
        assert self._template is not None
        written, numbers = self._as_asked(record["messages"])
        messages = self._template.prepared(written)
        tools = record.get("tools")
        row = self._controls.marked(messages, tools)
        if self._training.train_on == "all":
            text, _, own = row.plain(self._template.render(row.messages, tools=row.tools))
            losses = numbered(lost(messages, tools=tools, text=text, spans=None), numbers)
            refuse_lost(losses, trained=lambda _: True)
            earlier = [UNKNOWN_PLACE] * (sum(message["role"] == "assistant" for message in messages) - 1)
            further = self._missing(record["messages"], written, text, own) + self._template.unended(text, earlier)
            return _Text(text, spans=None, own=own, lost=losses + further)
        rendered = self._template.render_with_spans(row.messages, tools=row.tools)
        text, spans, own = row.plain(rendered.text, rendered.spans)
        carries_loss = _trained_messages(written, self._training)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        trained = {numbers[place] for place, carries in zip(places, carries_loss, strict=True) if carries}
        losses = numbered(lost(messages, tools=tools, text=text, spans=spans), numbers)
        refuse_lost(losses, trained=trained.__contains__)
        for place, (start, end), carries in zip(places, rendered.spans, carries_loss, strict=True):
            if carries:
                refuse_empty(rendered.text[start:end], numbers[place], ends=self._template.ways_to_end)
        answers = [(messages[place], span) for place, span in zip(places, spans, strict=True)]
        learnt = [(message, text[slice(*span)]) for message, span in compress(answers, carries_loss)]
        if self._training.mask_reasoning:
            spans = [behind_reasoning(message, text, span) for message, span in answers]
        kept_spans = [span for span, carries in zip(spans, carries_loss, strict=True) if carries]
        further = (
            self._missing(record["messages"], written, text, own)
            + words_of_template(learnt, ends=self._template.ways_to_end)
            + self._template.unended(text, kept_spans)
        )
        return _Text(text, kept_spans, own=own, lost=losses + further)

    def _missing(self, messages: Messages, written: Messages, text: str, own: Sequence[int]) -> list[MissingText]:
        """What is to be known of messages, and of them as they are asked with (`written`)."""
        return self._kept(text, own) + self._dropped(messages) + self._mapped(written)

    def _as_asked(self, messages: list[JsonObject]) -> tuple[list[JsonObject], list[int]]:
        """The messages that are rendered, and their places in the row."""
        if self._training.drop_history_reasoning:
            messages = without_history(messages)
        if self._training.system_prompt == "merge":
            return merged(messages)
        return messages, list(range(len(messages)))

    def _dropped(self, messages: list[JsonObject]) -> list[MissingText]:
        if not self._training.drop_history_reasoning or without_history(messages) == messages:
            return []
        return [history_dropped()]

    def _mapped(self, *conversations: Sequence[JsonObject]) -> list[MissingText]:
        assert self._template is not None
        if not any("tool_calls" in message for messages in conversations for message in messages):
            return []
        wanted = self._template.call_ids
        return [call_ids_mapped(wanted)] if any(are_changed(messages, wanted) for messages in conversations) else []

    def _kept(self, text: str, own: Sequence[int]) -> list[MissingText]:
        token = self._controls.first_kept(text, own)
        return [] if token is None else [kept_as_text(token, raw=False)]

    def _prompt_completion(self, record: JsonObject) -> _Text:
        prompt, completion = record["prompt"], record["completion"]
        return self._raw(prompt + completion, [(len(prompt), len(prompt + completion))])

    def _text(self, record: JsonObject) -> _Text:
        return self._raw(record["text"], None)

    def _raw(self, text: str, spans: list[Span] | None) -> _Text:
        """A text that no template wrote: control tokens in it are text unless the job asks otherwise."""
        spelled = self._controls.spelled_in(text)
        if not spelled:
            return _Text(text, spans, special_tokens=True)
        token = self._controls.first_kept(text, spelled) or ""
        if self._training.special_tokens == "parse":
            return _Text(text, spans, special_tokens=True, lost=[parsed(token)])
        return _Text(text, spans, special_tokens=True, own=spelled, lost=[kept_as_text(token, raw=True)])

    def _preference(self, record: JsonObject) -> _Answers:
        return self._answered(record, [record["chosen"], record["rejected"]])

    def _kto(self, record: JsonObject) -> _Answers:
        return self._answered(record, [record["completion"]], label=record["label"])

    def _answered(self, record: JsonObject, answers: list[JsonObject], *, label: bool = True) -> _Answers:
        assert self._template is not None
        written, numbers = self._as_asked(record["messages"])
        asked = self._template.prepared(written)
        given = [self._template.prepared([answer], before=written)[0] for answer in answers]
        tools = record.get("tools")
        row = self._controls.marked([*asked, *given], tools)
        marked = row.messages[: len(asked)]
        ends = [self._template.render([*marked, answer], tools=row.tools) for answer in row.messages[len(asked) :]]
        prompt = self._template.prompt_within(ends[0], marked, tools=row.tools)
        plain = row.plain(prompt)
        losses = numbered(lost(asked, tools=tools, text=plain.text, spans=None), numbers)
        wholes = [
            self._answered_once(prompt, whole, row, answer, len(asked))
            for whole, answer in zip(ends, given, strict=True)
        ]
        return _Answers(
            plain,
            wholes,
            label,
            lost=losses
            + next((kept for side in (plain, *wholes) if (kept := self._kept(side.text, side.own))), [])
            + words_of_template(
                zip(given, (whole.text[len(plain.text) :] for whole in wholes), strict=True),
                ends=self._template.ways_to_end,
            )
            + self._dropped(record["messages"])
            + self._mapped(*([*written, answer] for answer in answers)),
        )

    def _answered_once(self, prompt: str, whole: str, row: MarkedRow, answer: JsonObject, asked: int) -> PlainText:
        """`whole`, the rendering of `asked` messages and an answer behind them; `answer` is what that one says."""
        assert self._template is not None
        span = self._template.answer_behind(prompt, whole)
        plain = row.plain(whole, [span])
        losses = lost([answer], tools=None, text=plain.text, spans=plain.spans)
        refuse_lost([loss._replace(message=asked) for loss in losses], trained=lambda _: True)
        refuse_empty(whole[slice(*span)], asked, ends=self._template.ways_to_end)
        return row.plain(whole[: span[1]])

    # ---- to tokens

    def _labelled(self, row: _Text) -> TokenRow:
        """The row's tokens.

        A text that ends within a span and without an end-of-turn token gets the end token, labelled: a model that is
        never taught to stop does not.
        """
        spans = [(0, len(row.text))] if row.spans is None else row.spans
        ids, labelled = self._alignment.overlapping(row.text, spans, special_tokens=row.special_tokens, own=row.own)
        if spans and spans[-1][1] == len(row.text) and not self._ends_turn(ids.tolist()):
            ids = np.append(ids, np.int32(self._tokenizer.eos_token_id))
            labelled = np.append(labelled, True)
        labelled[:1] = False
        return TokenRow(ids=ids, labelled=labelled)

    def _ends_turn(self, ids: list[int]) -> bool:
        return self._tokenizer.eos_token_id is None or bool(ids and ids[-1] in self._specials)

    def _answers(self, row: _Answers) -> AnswersRow | None:
        prompt = self._alignment.encode(row.prompt.text, own=row.prompt.own)
        wholes = [self._ended(self._alignment.encode(whole.text, own=whole.own)) for whole in row.wholes]
        # The answer starts where prompt and whole part ways, which a merge across the boundary can put before its end.
        shared = min(common_prefix_length(prompt, whole) for whole in wholes)
        answers = [whole[shared:] for whole in wholes]
        return AnswersRow(prompt_ids=prompt[:shared], answers=answers, label=row.label) if all(answers) else None

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with an end token where they have none: as for supervised rows."""
        return ids if self._ends_turn(ids) else [*ids, int(self._tokenizer.eos_token_id)]


def _trained_messages(messages: list[JsonObject], training: Training) -> list[bool]:
    """For each assistant message, in order: does it carry loss?"""
    answers = [message.get("weight", 1) != 0 for message in messages if message["role"] == "assistant"]
    if training.train_on == "last_assistant":
        return [False] * (len(answers) - 1) + answers[-1:]
    return answers


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
        return AnswersRow(prompt_ids=row.prompt_ids, answers=[tokens[:room] for tokens in row.answers], label=row.label)
    cut = row if row.tokens <= max_length else TokenRow(ids=row.ids[:max_length], labelled=row.labelled[:max_length])
    return cut if cut.labelled.any() else None
