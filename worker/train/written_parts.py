"""A row as its user wrote it, part by part, to lay beside what its chat template makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from shared.contract.events import PART_CHARACTERS, WrittenPart
from worker.train.written import REASONING, MissingText

JsonObject = dict[str, Any]
_RAW: Final = ("text", "prompt", "completion")


def written_parts(record: JsonObject, lost: Sequence[MissingText]) -> list[WrittenPart]:
    """Tools, then each message: its reasoning, text and calls. What the template leaves out says so."""
    gone: dict[int | None, str] = {}
    for loss in lost:
        gone.setdefault(loss.message, loss.what)
    parts = [_part("tools", json.dumps(record["tools"], ensure_ascii=False))] if record.get("tools") else []
    for place, message in enumerate(record.get("messages", ())):
        parts += _parts_of(message, place, gone.get(place))
    for name in ("chosen", "rejected", *_RAW):
        value = record.get(name)
        parts += _parts_of(value, None, None, name) if isinstance(value, dict) else []
        parts += [_part(name, value)] if isinstance(value, str) else []
    return parts


def _parts_of(message: JsonObject, place: int | None, gone: str | None, name: str = "") -> Iterator[WrittenPart]:
    role = name or str(message.get("role"))
    for key in REASONING:
        if isinstance(message.get(key), str):
            yield _part(f"{role}, {key}", message[key], message=place, left_out=gone)
    if message.get("content"):
        yield _part(role, message["content"], message=place, left_out=gone)
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        text = f"{function.get('name')} {function.get('arguments')}"
        yield _part(f"{role}, call", text, message=place, left_out=gone)


def _part(what: str, text: str, *, message: int | None = None, left_out: str | None = None) -> WrittenPart:
    return WrittenPart(message=message, what=what, text=text[:PART_CHARACTERS], left_out=left_out)
