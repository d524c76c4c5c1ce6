"""Ids of calls as a template asks for them: Mistral 7B v0.3, Nemo and others take nine letters and digits only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import jinja2

JsonObject = dict[str, Any]

_NINE: Final = re.compile(r"[A-Za-z0-9]{9}")


def wants_nine_characters(render: Callable[[list[JsonObject]], str]) -> bool:
    """Whether a template refuses a call for its id, and takes it with one of nine letters and digits.

    `render` takes messages, and raises TemplateError where the template fails.
    """
    return not _takes(render, "call_0123456789abcdef") and _takes(render, "call12345")


def _takes(render: Callable[[list[JsonObject]], str], call_id: str) -> bool:
    call = {"id": call_id, "type": "function", "function": {"name": "w3ather", "arguments": {}}}
    try:
        render(
            [
                {"role": "user", "content": "A qu3stion"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        )
    except jinja2.TemplateError:
        return False
    return True


def nine_characters(call_id: str) -> str:
    """The id itself if it has that form, else one made of it: the same for a call and its answer."""
    return call_id if _NINE.fullmatch(call_id) else hashlib.blake2b(call_id.encode()).hexdigest()[:9]


def with_nine(message: JsonObject) -> JsonObject:
    """The message with the ids of its calls, or of the call that it answers, in nine characters."""
    changed: JsonObject = {}
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = nine_characters(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": nine_characters(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return {**message, **changed}


def are_changed(messages: Iterable[JsonObject]) -> bool:
    """Whether a call of these messages would get another id."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    return any(not _NINE.fullmatch(str(call.get("id"))) for call in calls)
