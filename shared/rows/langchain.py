"""Messages as LangChain and LangSmith write them, with OpenAI's names of roles. Pure, never raises.

Source: LangChain's `BaseMessage` as `model_dump`, `messages_to_dict` and `dumpd` write it: `type` says who speaks,
around it stands nothing, `data`, or `lc`, `id` and `kwargs`.
"""

from __future__ import annotations

import json
from typing import Any, Final

from shared.rows.formats import Message

_ROLES: Final = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "function"}
_KEPT: Final = frozenset({"content", "name", "tool_calls", "tool_call_id"})
# How a model answered, and what a program keeps beside a message: nothing of it is for a model to read.
_NOTES: Final = frozenset(
    {"type", "id", "example", "response_metadata", "usage_metadata", "additional_kwargs", "invalid_tool_calls"}
    | {"artifact", "status"}
)
_COPIES: Final = frozenset({"tool_calls", "function_call", "refusal", "parsed"})  # as the service wrote them


def messages(items: list[Any]) -> list[Message] | None:
    """The messages with a role each; None where one is no message of LangChain's, or has what cannot be kept."""
    made = [_message(item) for item in items]
    return None if None in made else [message for message in made if message is not None]


def _message(item: Any) -> Message | None:
    item = _unwrapped(item)
    if not isinstance(item, dict) or not isinstance(item.get("type"), str) or {"role", "from"} & item.keys():
        return None
    role = _ROLES.get(item["type"].removesuffix("MessageChunk").removesuffix("Message").casefold())
    more = item.get("additional_kwargs") or {}
    if role is None or "content" not in item or item.get("invalid_tool_calls") or item.get("status") == "error":
        return None
    if item.keys() - _KEPT - _NOTES or not isinstance(more, dict):
        return None
    reasoning = more.get("reasoning_content")
    if any(more[key] for key in more.keys() - _COPIES - {"reasoning_content"}):
        return None
    message = {key: item[key] for key in _KEPT & item.keys() if item[key] not in (None, [])}
    calls = item.get("tool_calls") or more.get("tool_calls") or []
    if more.get("function_call") and not calls:
        message["function_call"] = more["function_call"]
    if not isinstance(calls, list):
        return None
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    thoughts = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": role, **message, **thoughts}


def _unwrapped(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if item.get("lc") == 1 and isinstance(item.get("kwargs"), dict) and isinstance(item.get("id"), list):
        return {"type": str(item["id"][-1]) if item["id"] else "", **item["kwargs"]}
    if item.keys() == {"type", "data"} and isinstance(item["data"], dict):
        return {**item["data"], "type": item["type"]}
    return item


def _call(call: Any) -> Any:
    if (
        not isinstance(call, dict)
        or call.get("type", "tool_call") != "tool_call"
        or not isinstance(call.get("args"), dict)
    ):
        return call
    arguments = json.dumps(call["args"], ensure_ascii=False)
    return {"id": call.get("id"), "type": "function", "function": {"name": call.get("name"), "arguments": arguments}}
