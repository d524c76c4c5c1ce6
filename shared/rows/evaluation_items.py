"""Items of an evaluation, from the lines of a file: what is asked, what the answer should be, and the row's other keys.

A row that trains is an item: its last answer is the reference. A row that ends in a question is one too, without a
reference. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shared.contract.answer_scores import NothingAsked, asked_and_answer
from shared.contract.evaluation_run import SHOWN_CHARACTERS, ItemAsked, ItemFault, PartName, storable
from shared.contract.spec import Format
from shared.rows import formats, placeholders, shapes
from shared.rows.formats import FORMAT_OF, KEYS
from shared.rows.placeholders import BadPlaceholder, NoSuchVariable
from shared.rows.rules import check_row
from shared.rows.shapes import UnknownShape

Message = dict[str, Any]
LINE_CHARACTERS: Final = 2_000_000
SLICE_CHARACTERS: Final = 100
KEPT_CHARACTERS: Final = 100_000  # of a run's item


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """`fault`: why it cannot be asked at all."""

    number: int  # counted from 1
    line: int | None
    part: PartName = "items"
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    reference: str | None = None
    format: Format | None = None
    record: dict[str, Any] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)  # the keys that a training does not read
    fault: ItemFault | None = None
    given: str | None = None  # the answer, where nothing is to be generated
    is_run: bool = False  # of OpenAI's evals: its row and messages are kept beside its answers

    @property
    def prompt(self) -> str:
        """The beginning of what is asked, to be shown."""
        text = self.text if self.messages is None else (self.messages[-1].get("content") if self.messages else "")
        return storable(str(text or "")[:SHOWN_CHARACTERS])

    def asked(self, subjects: Sequence[int]) -> ItemAsked:
        """As the program reads it."""
        return ItemAsked(
            part=self.part,
            item=self.number,
            messages=self.messages,
            tools=self.tools,
            text=self.text,
            format=self.format,
            record=self.record,
            subjects=list(subjects),
        )

    def kept(self) -> dict[str, Any]:
        """What is stored of a run's item beside an answer, as far as it is not too long."""
        if not self.is_run and self.given is None:
            return {}
        asked = [{"role": each["role"], "content": _shown(each.get("content"))} for each in self.messages or ()]
        written = json.dumps(dict(self.row))
        row = json.loads(storable(written)) if len(written) <= KEPT_CHARACTERS and "\\u0000" not in written else {}
        return {"row": row, "asked": asked}

    def slices(self, keys: Iterable[str]) -> dict[str, str | None]:
        """The row's values at `keys`, as text; null where it has none."""
        return {key: _slice(self.row, key) for key in keys}


def _shown(content: Any) -> str:
    return storable(str(content or "")[:SHOWN_CHARACTERS])


def _slice(row: Mapping[str, Any], key: str) -> str | None:
    try:
        value = placeholders.reach(row, key)
    except (NoSuchVariable, BadPlaceholder):
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return storable(text[:SLICE_CHARACTERS])


def items(lines: Iterable[bytes], *, most: int, share: float = 1.0) -> Iterator[EvaluationItem]:
    """The first `most` items of JSONL; with a `share` below 1 those whose line's sha256 falls into it."""
    number = 0
    for place, line in enumerate(lines, start=1):
        if not line.strip() or not _falls_into(line, share):
            continue
        number += 1
        yield _item(line, number=number, place=place)
        if number == most:
            return


def _falls_into(line: bytes, share: float) -> bool:
    """The same rows whatever their order and whatever else is in the file: the hash decides, white space aside."""
    if share >= 1:
        return True
    digest = hashlib.sha256(line.strip()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _item(line: bytes, *, number: int, place: int) -> EvaluationItem:
    try:
        row = json.loads(line[: LINE_CHARACTERS + 1].decode("utf-8-sig")) if len(line) <= LINE_CHARACTERS else None
    except (ValueError, RecursionError):
        return _faulty(number, place, "invalid_json", "The line is no JSON.")
    if not isinstance(row, dict):
        return _faulty(number, place, "invalid_row", "The line is no JSON object, or too long for one.")
    try:
        return of_row(row, number=number, line=place)
    except NotAnItem as error:
        return _faulty(number, place, "invalid_row", str(error))


def _faulty(number: int, line: int, code: str, message: str) -> EvaluationItem:
    return EvaluationItem(number=number, line=line, fault=ItemFault(code=code, message=message[:500]))


class NotAnItem(ValueError):
    """The row is no item. Its words are for the user."""


def of_row(row: dict[str, Any], *, number: int, line: int | None, part: PartName = "items") -> EvaluationItem:
    """The item that a row is."""
    try:
        shape = shapes.detect(row)
    except UnknownShape as error:
        raise NotAnItem(str(error)) from None
    format_ = FORMAT_OF[shape]
    open_ended = shape == "chat" and _ends_in_a_question(row)
    whole = {**row, "messages": [*row["messages"], {"role": "assistant", "content": "-"}]} if open_ended else row
    read = {key: value for key, value in whole.items() if key in KEYS[shape]}
    first = next(iter(check_row(read, shape).problems), None)
    if first is not None:
        raise NotAnItem(first.message)
    record = formats.normalise(read, shape)
    extra = {key: value for key, value in row.items() if key not in KEYS[shape]}
    try:
        parts = asked_and_answer(format_, record)
    except NothingAsked as error:
        raise NotAnItem(str(error)) from None
    if open_ended:
        parts.update(reference=None, record=None, format=None)
    return EvaluationItem(number=number, line=line, part=part, tools=record.get("tools"), row=extra, **parts)


def _ends_in_a_question(row: dict[str, Any]) -> bool:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") in {"user", "tool"}
