"""Ids of calls as a template asks for them.

Mistral 7B v0.3, Nemo and others take nine letters and digits only. Kimi K2 writes a call's id in place of its name: it
is `functions.NAME:NUMBER`, with numbers through the conversation. Its first template made such ids of calls by itself,
with numbers through the answer, and wrote the id of a result as it is given.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jinja2

JsonObject = dict[str, Any]

_NINE: Final = re.compile(r"[A-Za-z0-9]{9}")
_LONG, _SHORT, _NAME = "call_0123456789abcdef", "call12345", "w3ather"


class CallIds(enum.Enum):
    """Which ids a template takes."""

    ANY = "any"
    NINE = "nine characters"
    NAMED = "functions.NAME:NUMBER, in order"
    NAMED_PER_ANSWER = "functions.NAME:NUMBER, in the order of their answer"


def asked_for(render: Callable[[list[JsonObject]], str]) -> CallIds:
    """The ids that a template asks for. `render` takes messages, and raises TemplateError where the template fails."""
    written = _written(render, _LONG)
    if written is None:
        return CallIds.ANY if _written(render, _SHORT) is None else CallIds.NINE
    if f"functions.{_NAME}:0" in written:
        return CallIds.NAMED_PER_ANSWER
    return CallIds.NAMED if _LONG in written and _NAME not in written else CallIds.ANY


def _written(render: Callable[[list[JsonObject]], str], call_id: str) -> str | None:
    call = {"id": call_id, "type": "function", "function": {"name": _NAME, "arguments": {}}}
    asked = {"role": "user", "content": "A qu3stion"}
    try:
        return render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except jinja2.TemplateError:
        return None


def with_ids(messages: Sequence[JsonObject], wanted: CallIds) -> list[JsonObject]:
    """`messages` with the ids that a template asks for: the same for a call and its result."""
    if wanted is CallIds.ANY or (wanted is CallIds.NAMED and all(map(_is_named, _calls(messages)))):
        return list(messages)
    now: dict[str, str] = {}  # a later call may have the id of an earlier one
    made: list[JsonObject] = []
    before = 0
    for message in messages:
        calls = message.get("tool_calls") or ()
        named = [_with_id(call, before + place, wanted) for place, call in enumerate(calls)]
        before += len(calls) if wanted is CallIds.NAMED else 0
        now |= {call["id"]: new["id"] for call, new in zip(calls, named, strict=True) if "id" in call}
        answered = message.get("tool_call_id")
        changed: JsonObject = {"tool_calls": named} if calls else {}
        if isinstance(answered, str):
            changed["tool_call_id"] = now.get(answered) or (
                nine_characters(answered) if wanted is CallIds.NINE else answered
            )
        made.append({**message, **changed})
    return made


def _calls(messages: Sequence[JsonObject]) -> Iterator[JsonObject]:
    return (call for message in messages for call in message.get("tool_calls") or ())


def _name(call: JsonObject) -> str:
    return str((call.get("function") or {}).get("name"))


def _is_named(call: JsonObject) -> bool:
    return re.fullmatch(rf"functions\.{re.escape(_name(call))}:\d+", str(call.get("id"))) is not None


def _with_id(call: JsonObject, number: int, wanted: CallIds) -> JsonObject:
    if wanted is CallIds.NINE:
        return {**call, "id": nine_characters(call["id"])} if isinstance(call.get("id"), str) else call
    return {**call, "id": f"functions.{_name(call)}:{number}"}


def nine_characters(call_id: str) -> str:
    """The id itself if it has that form, else one made of it: the same for a call and its answer."""
    return call_id if _NINE.fullmatch(call_id) else hashlib.blake2b(call_id.encode()).hexdigest()[:9]


def are_changed(messages: Sequence[JsonObject], wanted: CallIds) -> bool:
    """Whether a call of these messages would get another id."""
    return wanted is not CallIds.ANY and with_ids(messages, wanted) != list(messages)
