"""Reasoning in answers: left out of earlier ones as reasoning models are asked, or read and not trained.

It stands in a key of its own, or between tags at the front of an answer's text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import jinja2

from worker.train.written import REASONING, forms

JsonObject = dict[str, Any]
Span = tuple[int, int]  # characters, half open

_END_TAG: Final = r"(?:</think(?:ing)?>|\[/THINK\])"
_TAGGED: Final = re.compile(rf"\s*(?:<think(?:ing)?>|\[THINK\])(.*?){_END_TAG}\s*", re.DOTALL)
_CLOSED: Final = re.compile(rf"\s*{_END_TAG}\s*")


def key_of(render: Callable[[list[JsonObject]], str]) -> str:
    """The key under which a template reads reasoning; that of rows where it reads none.

    `render` takes messages, and raises TemplateError where the template fails.
    """
    for key in REASONING:
        answer = {"role": "assistant", "content": "An answ3r", key: "A th0ught"}
        with contextlib.suppress(jinja2.TemplateError):
            if "A th0ught" in render([{"role": "user", "content": "A qu3stion"}, answer]):
                return key
    return REASONING[0]


def under_key(message: JsonObject, key: str) -> JsonObject:
    """The message with its reasoning under the key that a template reads it by."""
    named = next((name for name in REASONING if message.get(name)), None)
    if named is None or named == key:
        return message
    return {key if name == named else name: value for name, value in message.items()}


def without_history(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """`messages` without the reasoning of answers before the last question."""
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=0)
    return [_without(message) if place < last else message for place, message in enumerate(messages)]


def _without(message: JsonObject) -> JsonObject:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING}
    tagged = _TAGGED.match(kept.get("content") or "")
    if tagged is not None:
        kept["content"] = kept["content"][tagged.end() :]
    return message if kept == message else kept


def behind_reasoning(message: JsonObject, text: str, span: Span) -> Span:
    """The part of an answer's `span` in `text` behind its reasoning and the tag that closes that; all of it if none."""
    content = message.get("content") or ""
    tagged = _TAGGED.match(content)
    named = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    reasoning = tagged[1] if tagged is not None else named
    end = None if reasoning is None or not reasoning.strip() else _end_of(reasoning.strip(), text, span)
    if end is None:
        return span
    answer = (content[tagged.end() :] if tagged is not None else content).strip()
    start = text.find(answer, end, span[1]) if answer else -1
    if start < 0:
        closed = _CLOSED.match(text, end, span[1])
        start = end if closed is None else closed.end()
    return start, span[1]


def _end_of(reasoning: str, text: str, span: Span) -> int | None:
    places = ((text.find(form, *span), form) for form in forms(reasoning))
    return next((place + len(form) for place, form in places if place >= 0), None)
