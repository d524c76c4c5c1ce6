"""Conversations that write calls and their answers as tagged text, as Hermes' function-calling sets do.

Source: the data set card of NousResearch/hermes-function-calling-v1: `<tool_call>{"name", "arguments"}</tool_call>` in
the assistant's text, `<tool_response>` in that of the speaker `tool`, the tools as JSON text in a column of their own.
"""

from __future__ import annotations

import ast
import json
from typing import Any, Final

from shared.rows import strict_json
from shared.rows.formats import SHAREGPT_ROLES, Message, arguments_text, sharegpt_tools
from shared.rows.loss_flags import TRUTHS, weight_of
from shared.rows.slips import is_python

_LITERAL_CHARACTERS: Final = 100_000


def messages(items: Any) -> list[Message] | None:
    """Messages with `tool_calls` from ShareGPT items if one of them holds tagged calls; None for all other items.

    Text may stand before calls, not behind or between them. As many answers follow as there were calls.
    """
    if not isinstance(items, list) or not any(_calls_by_tag(item) for item in items):
        return None
    made: list[Message] = []
    waiting: list[str] = []
    for item in items:
        speaker = item.get("from") if isinstance(item, dict) else None
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role not in {"system", "user", "assistant", "tool"} or not isinstance(item.get("value"), str):
            return None
        turn = _answers(item["value"], waiting) if role == "tool" else _turn(item, role, len(made))
        if turn is None:
            return None
        if isinstance(item.get("name"), str):
            turn = [{**message, "name": item["name"]} for message in turn]
        waiting = [call["id"] for message in turn for call in message.get("tool_calls", ())]
        made += turn
    return made


def from_messages(listed: Any) -> list[Message] | None:
    """The same from messages of role and content, where a tool answers a call that stands as tagged text alone."""
    if not isinstance(listed, list) or not all(map(_is_spoken, listed)):
        return None
    if not any(message["role"] == "tool" for message in listed):
        return None  # text that nobody answers stays as it is
    return messages([{**message, "from": message["role"], "value": message["content"]} for message in listed])


def _is_spoken(message: Any) -> bool:
    """A message of text, perhaps with a flag of loss: with calls and ids it is in OpenAI's form already."""
    return (
        isinstance(message, dict)
        and isinstance(message.get("content"), str)
        and isinstance(message.get("role"), str)
        and message.keys() <= {"role", "content", "name", "weight", *TRUTHS}
    )


def tools(text: str) -> Any:
    """The tools that a column names as JSON text; the text itself when it does not."""
    try:
        listed = strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return text
    is_list = isinstance(listed, list) and all(isinstance(tool, dict) for tool in listed)
    return sharegpt_tools(listed) if is_list else text


def _calls_by_tag(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("value"), str) and "<tool_call>" in item["value"]


def _turn(item: dict[str, Any], role: str, place: int) -> list[Message] | None:
    message: Message = {"role": role, "content": item["value"]}
    if role == "assistant" and _calls_by_tag(item):
        text, blocks = _between(item["value"], "tool_call")
        calls = [_call(block, f"call_{place}_{number}") for number, block in enumerate(blocks)]
        if not calls or None in calls:
            return None
        message = {"role": role, "content": text.strip() or None, "tool_calls": calls}
    weight = weight_of(item)
    return [message if weight is None else {**message, "weight": weight}]


def _call(block: str, call_id: str) -> dict[str, Any] | None:
    call = _read(block)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    if not call.keys() <= {"name", "arguments"} or not isinstance(call.get("arguments"), str | dict):
        return None
    function = {"name": call["name"], "arguments": arguments_text(call["arguments"])}
    return {"id": call_id, "type": "function", "function": function}


def _read(block: str) -> Any:
    """The value of a call's text: JSON, or the literal that Python's str makes of an object, as Hermes' set has."""
    try:
        if is_python(block) and len(block) <= _LITERAL_CHARACTERS:
            block = json.dumps(ast.literal_eval(block.strip()))
        return strict_json.parse(block, long_integers=True)
    except (strict_json.BadJson, ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _between(value: str, tag: str) -> tuple[str, list[str]]:
    """The text before the first `<tag>`, and what is within each; none when text stands elsewhere. In linear time."""
    text, *parts = value.split(f"<{tag}>")
    blocks = [part.partition(f"</{tag}>") for part in parts]
    if not all(end and not rest.strip() for _, end, rest in blocks):
        return value, []
    return text, [block.strip() for block, _, _ in blocks]


def _answers(value: str, waiting: list[str]) -> list[Message] | None:
    text, blocks = _between(value, "tool_response")
    if text.strip() or not blocks:
        blocks = [value]  # no tags, or text beside them: one answer as it stands
    if len(blocks) != len(waiting):
        return None
    return [
        {"role": "tool", "tool_call_id": call, "content": block} for call, block in zip(waiting, blocks, strict=True)
    ]
