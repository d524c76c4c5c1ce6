"""Rows of glaive's function-calling sets: a whole conversation in one text, its functions within the system text.

Source: the data set card of glaiveai/glaive-function-calling-v2. `system` holds an instruction and the functions as
JSON objects, one behind the other. `chat` holds turns of `USER:`, `ASSISTANT:` and `FUNCTION RESPONSE:`, with an end
token behind each answer, and calls as `<functioncall> {"name": "f", "arguments": '{"x": 1}'}`.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from shared.rows import strict_json
from shared.rows.arguments import BadArguments, object_text
from shared.rows.formats import Message, arguments_text
from shared.rows.shapes import Row

_TURN: Final = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_END: Final = "<|endoftext|>"
_CALL: Final = "<functioncall>"
_QUOTED: Final = re.compile(r"""\s*\{\s*"name"\s*:\s*("[^"\\]*")\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}\s*""", re.DOTALL)
_OBJECT: Final = json.JSONDecoder()


def rewritten(row: Row) -> Row | None:
    """The row as messages and tools; None where a turn, a call or a function of it cannot be read exactly."""
    chat, system = row.get("chat"), row.get("system") or ""
    if not isinstance(chat, str) or not isinstance(system, str) or any(row.get(key) for key in ("messages", "tools")):
        return None
    read = _system(system)
    messages = _messages(chat)
    if read is None or not messages:
        return None
    text, functions = read
    rest = {key: value for key, value in row.items() if key not in {"chat", "system"}}
    made: Row = {**rest, "messages": [{"role": "system", "content": text}, *messages] if text else messages}
    return made | (
        {"tools": [{"type": "function", "function": function} for function in functions]} if functions else {}
    )


def _system(text: str) -> tuple[str, list[dict[str, Any]]] | None:
    """The instruction, and the functions behind it."""
    text = text.strip().removeprefix("SYSTEM:").strip()
    words, brace, _ = text.partition("{")
    functions: list[dict[str, Any]] = []
    place = len(words)
    while brace and place < len(text):
        start = place
        try:
            _, place = _OBJECT.raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        function = _parsed(text[start:place])
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        functions.append(function)
        place += len(text[place:]) - len(text[place:].lstrip())
    return words.strip(), functions


def _messages(chat: str) -> list[Message] | None:
    """In OpenAI's older form: calls and results without ids, which are made later on."""
    before, *parts = _TURN.split(chat)
    if before.strip():
        return None
    messages: list[Message] = []
    for who, words in zip(parts[::2], parts[1::2], strict=True):
        turn = _turn(who, words.strip(), messages)
        if turn is None:
            return None
        messages.append(turn)
    return messages


def _turn(who: str, words: str, before: list[Message]) -> Message | None:
    if who == "USER":
        return {"role": "user", "content": words}
    if who == "FUNCTION RESPONSE":
        called = before[-1].get("function_call") if before else None
        return None if called is None else {"role": "function", "name": called["name"], "content": words}
    text, mark, call = words.removesuffix(_END).strip().partition(_CALL)
    if not mark:
        return {"role": "assistant", "content": text}
    function = _function(call)
    return function and {"role": "assistant", "content": text.strip() or None, "function_call": function}


def _function(text: str) -> dict[str, Any] | None:
    """A call: its arguments are an object, JSON text, or an object between single quotes."""
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        call = {"name": _parsed(quoted[1]), "arguments": quoted[2].replace("\\'", "'")}
    else:
        call = _parsed(text)
    if not isinstance(call, dict) or not call.keys() <= {"name", "arguments"} or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    try:
        return {"name": call["name"], "arguments": object_text(arguments_text(arguments))}
    except (BadArguments, TypeError):
        return None


def _parsed(text: str) -> Any:
    try:
        return strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return None
