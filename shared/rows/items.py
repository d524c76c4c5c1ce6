"""The rules of what stands within a message: parts of its content, and the keys of a ShareGPT item."""

from __future__ import annotations

from typing import Any, Final

from shared.rows.columns import is_media
from shared.rows.findings import RowFindings, shown
from shared.rows.loss_flags import (
    CALLS,
    CHOOSING,
    NOT_OFFERED,
    REASONING_KEYS,
    SKIPS,
    TRUTHS,
    names_loss,
    reasoning_of,
    truth_of,
    unread_keys,
)
from shared.rows.shapes import Row

# Parts of other services, each with what stands for it here.
_PARTS: Final = {
    **dict.fromkeys(("tool_use", "tool-call", "tool_call", "function_call"), "write it as tool_calls"),
    **dict.fromkeys(
        ("tool_result", "tool-result", "tool_response", "function_call_output"), "write it as a message of role tool"
    ),
    "redacted_thinking": "remove it, nobody can read it",
    "thinking": "write it as reasoning_content",
    "reasoning": "write it as reasoning_content",
}
# Parts of Gemini and Bedrock that are no text: their only key says so.
_MEDIA: Final = frozenset(
    {"inlineData", "inline_data", "fileData", "file_data", "image", "video", "audio", "document", "executableCode"}
    | {"codeExecutionResult"}
)


def parts_size(parts: list[Any], at: str, findings: RowFindings) -> int:
    """Characters of content that is a list of parts; parts that are no text are refused."""
    size = 0
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None and isinstance(part, dict) and len(part) == 1 and next(iter(part)) in _MEDIA:
            text = f"{at}[{index}] holds {next(iter(part))}; training is text-only, remove rows with such."
            findings.refuse(f"{at}[{index}]", "unsupported_content", text)
            continue
        if kind == "text" and isinstance(part.get("text"), str):
            size += len(part["text"])
        elif isinstance(kind, str) and kind != "text":
            remedy = _PARTS.get(kind, "training is text-only, keep only parts of type text")
            text = f"{at}[{index}].type is {shown(kind)}; {remedy}."
            findings.refuse(f"{at}[{index}].type", "unsupported_content", text)
        else:
            text = f'{at}[{index}] is {shown(part)}; use {{"type": "text", "text": "…"}}.'
            findings.refuse(f"{at}[{index}]", "wrong_type", text)
    return size


def check_item_keys(item: Row, role: str, name: str, at: str, findings: RowFindings) -> None:
    """Judge what stands beside `from` and `value`: obeyed, refused by name, or dropped and counted."""
    for key, near in unread_keys(item):
        if names_loss(key) or key in SKIPS or (key in CHOOSING and truth_of(item.get(key)) is not None):
            refuse_flag(f"{at}.{key}", findings)
        elif is_media(key):
            refuse_medium(f"{at}.{key}", findings)
        elif near:
            findings.refuse(f"{at}.{key}", "unknown_key", f"{at}.{key} is not a known key; did you mean {near}?")
        elif f"{name}[].{key}" not in findings.dropped:
            findings.dropped.append(f"{name}[].{key}")
    for key in TRUTHS:
        if item.get(key) is not None and truth_of(item[key]) is None:
            findings.refuse(f"{at}.{key}", "wrong_type", f"{at}.{key} is {shown(item[key])}; use true or false.")
    for key in NOT_OFFERED:
        if item.get(key) is not None:
            refuse_flag(f"{at}.{key}", findings)
    for key in CALLS:
        if item.get(key) not in (None, [], {}):
            text = f"{at}.{key} is not read in this shape; write the call as an item from function_call."
            findings.refuse(f"{at}.{key}", "unknown_key", text)
    _check_reasoning(item, role, at, findings)


def refuse_medium(name: str, findings: RowFindings) -> None:
    """A picture, a video or a sound beside a message."""
    text = f"{name} holds a picture, a video or a sound; training is text-only, remove rows with such."
    findings.refuse(name, "unsupported_content", text)


def refuse_flag(name: str, findings: RowFindings) -> None:
    """A flag of loss that tools read in unlike ways."""
    findings.refuse(name, "unknown_key", f"{name} is not offered; use train (true or false) for the whole message.")


def _check_reasoning(item: Row, role: str, at: str, findings: RowFindings) -> None:
    named = [key for key in REASONING_KEYS if item.get(key) not in (None, "")]
    if named and (role != "assistant" or reasoning_of(item) is None):
        text = f"{at}.{named[0]} must be one text beside an answer; remove it, or write it in one place."
        findings.refuse(f"{at}.{named[0]}", "wrong_type", text)


def refuse_other_calls(message: Row, at: str, findings: RowFindings) -> None:
    """Calls of a message in both of OpenAI's forms: one of them would be trained, so they must say the same."""
    old, calls = message["function_call"], message.get("tool_calls") or []
    new = [call.get("function") if isinstance(call, dict) else call for call in calls]
    if calls and new != (old if isinstance(old, list) else [old]):
        text = f"{at}.function_call and {at}.tool_calls are different calls; keep tool_calls, with all of them."
        findings.refuse(f"{at}.function_call", "unknown_key", text)
