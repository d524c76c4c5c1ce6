"""Items of OpenAI's Responses API, rewritten into messages: calls, their outputs and reasoning stand beside messages.

Source: OpenAI's reference of Responses (`message`, `function_call`, `function_call_output`, `reasoning`).
"""

from __future__ import annotations

from typing import Any, Final

from shared.rows.formats import Message

_ITEMS: Final = frozenset({"function_call", "function_call_output", "reasoning"})
_CALL: Final = frozenset({"type", "id", "call_id", "name", "arguments", "status"})
_OUTPUT: Final = frozenset({"type", "id", "call_id", "output", "status"})
_REASONING: Final = frozenset({"type", "id", "summary", "content", "encrypted_content", "status"})


def messages(items: list[Any]) -> list[Message] | None:
    """The messages that items stand for; None where there is no such item, or one that has no place in messages."""
    if not any(isinstance(item, dict) and (_kind(item) is not None or _is_message(item)) for item in items):
        return None
    made: list[Message] = []
    thoughts = ""
    for item in items:
        kind = _kind(item) if isinstance(item, dict) else None
        if kind == "reasoning":
            thought = _thought(item)
            if thought is None:
                return None
            thoughts += thought
            continue
        message = _message(item, kind)
        if message is None:
            return None
        if thoughts and message["role"] == "assistant":
            message, thoughts = {**message, "reasoning_content": thoughts}, ""
        if kind == "function_call" and made and made[-1].get("tool_calls") and "reasoning_content" not in message:
            made[-1]["tool_calls"] += message["tool_calls"]  # parallel calls
        else:
            made.append(message)
    return None if thoughts else made


def _is_message(item: dict[str, Any]) -> bool:
    """A message with the type that the Responses API gives it."""
    return item.get("type") == "message" and isinstance(item.get("role"), str)


def unreadable(items: list[Any]) -> set[str]:
    """Keys of items whose value nobody but OpenAI can read."""
    encrypted = any(isinstance(item, dict) and item.get("encrypted_content") for item in items)
    return {"encrypted_content"} if encrypted else set()


def _kind(item: dict[str, Any]) -> str | None:
    kind = item.get("type")
    return kind if "role" not in item and isinstance(kind, str) and kind in _ITEMS else None


def _message(item: Any, kind: str | None) -> Message | None:
    if kind == "function_call" and item.keys() <= _CALL and isinstance(item.get("call_id"), str):
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item["call_id"], "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output" and item.keys() <= _OUTPUT and isinstance(item.get("call_id"), str):
        return {"role": "tool", "tool_call_id": item["call_id"], "content": item.get("output")}
    if kind is None and isinstance(item, dict) and isinstance(item.get("role"), str):
        return {key: value for key, value in item.items() if key != "status" and (key, value) != ("type", "message")}
    return None


def _thought(item: dict[str, Any]) -> str | None:
    """The text of a reasoning item: its content, or else the summary; None where it holds something else."""
    parts = item.get("content") or item.get("summary") or []
    if not item.keys() <= _REASONING or not isinstance(parts, list):
        return None
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else None
