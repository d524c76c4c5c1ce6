"""Rows as other services take them for tuning or answer with them, rewritten into OpenAI's form. Pure, never raises.

Sources: Amazon Bedrock (`bedrock-conversation-2024`, `toolConfig`), Anthropic's Messages API (`tool_use`,
`tool_result`, `input_schema`), the data set cards of Salesforce's xlam-function-calling-60k, Capybara, Firefly,
WildChat and LMSYS-Chat-1M.
What has no place here stays as it is, and the rules refuse it by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from shared.rows import gemini, glaive, strict_json, turn_lists
from shared.rows.formats import Message, arguments_text
from shared.rows.parts import is_ours, objects, text_of, without
from shared.rows.shapes import Row

COLUMNS: Final = frozenset(
    {
        "contents",
        "systemInstruction",
        "system_instruction",
        "toolConfig",
        "query",
        "answers",
        "tools",
        "conversation",
        "chat",
    }
)
_PAIRS: Final = (("input", "output"), ("human", "assistant"))
_OF_PAIRS: Final = frozenset({"system", "output_with_loss"})  # XTuner's


def read(row: Row) -> tuple[Row, tuple[str, ...]]:
    """The row in OpenAI's form, and the forms that it was read from."""
    forms: list[str] = []
    marked = [form for form in _FORMS if form.mark in row]
    for form in marked:
        made = form.rewritten(row)
        if made is not None:
            row = made
            forms.append(form.name)
    return row, tuple(forms)


# ---- Bedrock and Anthropic


def _blocks(row: Row) -> Row | None:
    made: Row = {}
    messages = row["messages"]
    if isinstance(messages, list) and any(map(_has_parts, messages)) and objects(messages) is not None:
        read_messages = [_of_blocks(message) for message in messages]
        if any(several is not None for several in read_messages):
            pairs = zip(messages, read_messages, strict=True)
            made["messages"] = [each for message, several in pairs for each in several or [message]]
    if isinstance(row.get("system"), list) and (text := text_of(row["system"])) is not None:
        made["system"] = text
    if (tools := _with_schemas(row)) is not None:
        made["tools"] = tools
        row = without(row, "toolConfig")
    return {**row, **made} if made else None


def _has_parts(message: Any) -> bool:
    return type(message) is dict and type(message.get("content")) is list


def _of_blocks(message: dict[str, Any]) -> list[Message] | None:
    """The messages that a list of blocks stands for; None where it has none, or one that has no place here."""
    parts = message.get("content")
    if not isinstance(parts, list) or not any(_is_block(part) for part in parts):
        return None
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    thoughts = ""
    for part in parts:
        block = part if isinstance(part, dict) else {}
        if block.keys() == {"cachePoint"}:
            continue  # where a service may keep what was read: it says nothing
        if (thought := _thought_of(block)) is not None and message.get("role") == "assistant":
            thoughts += thought
        elif block.keys() == {"text"} and not calls:
            texts.append({"type": "text", "text": block["text"]})
        elif (call := _call_of(block)) is not None and message.get("role") == "assistant":
            calls.append(call)
        elif (result := _result_of(block)) is not None and message.get("role") == "user" and not texts:
            results.append(result)
        elif not calls and not _is_block(part):
            texts.append(part)
        else:
            return None
    if (results and message.keys() != {"role", "content"}) or (thoughts and message.get("reasoning_content")):
        return None  # which of the messages would the other keys belong to? which thoughts are meant?
    if results and not texts:
        return results
    text = text_of(texts)
    spoken = {**message, "content": texts if texts and text is None else text}
    spoken |= {"reasoning_content": thoughts} if thoughts else {}
    return [*results, {**spoken, "tool_calls": calls} if calls else spoken]


def _is_block(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in ("tool_use", "tool_result") or (
        len(part) == 1 and next(iter(part)) in {"text", "toolUse", "toolResult", "cachePoint", "reasoningContent"}
    )


def _thought_of(block: dict[str, Any]) -> str | None:
    """The text of Bedrock's block of reasoning; None for all others."""
    reasoning = block["reasoningContent"] if block.keys() == {"reasoningContent"} else None
    written = reasoning.get("reasoningText") if isinstance(reasoning, dict) else None
    text = written.get("text") if isinstance(written, dict) else None
    return text if isinstance(text, str) else None


def _call_of(block: dict[str, Any]) -> dict[str, Any] | None:
    use = block.get("toolUse") if len(block) == 1 else without(block, "type", "cache_control")
    if not isinstance(use, dict) or (len(block) > 1 and block.get("type") != "tool_use"):
        return None
    called = use.get("toolUseId", use.get("id"))
    if not use.keys() <= {"toolUseId", "id", "name", "input"} or not isinstance(use.get("input"), dict):
        return None
    if not isinstance(called, str):
        return None
    function = {"name": use.get("name"), "arguments": json.dumps(use["input"], ensure_ascii=False)}
    return {"id": called, "type": "function", "function": function}


def _result_of(block: dict[str, Any]) -> Message | None:
    result = block.get("toolResult") if len(block) == 1 else without(block, "type", "cache_control")
    if not isinstance(result, dict) or (len(block) > 1 and block.get("type") != "tool_result"):
        return None
    if not result.keys() <= {"toolUseId", "tool_use_id", "content", "is_error", "status"}:
        return None
    if result.get("is_error") or result.get("status") not in (None, "success"):
        return None  # whether it failed is said beside its text, for which messages have no place
    content = result.get("content", "")
    listed = objects(content)
    if listed is not None and all(part.keys() == {"json"} for part in listed):
        content = "".join(json.dumps(part["json"], ensure_ascii=False) for part in listed)
    text = content if isinstance(content, str) else text_of(content)
    called = result.get("toolUseId", result.get("tool_use_id"))
    if text is None or not isinstance(called, str):
        return None
    return {"role": "tool", "tool_call_id": called, "content": text}


def _with_schemas(row: Row) -> list[Any] | None:
    """Tools as functions: Anthropic's with `input_schema`, Bedrock's with `toolSpec`; None for all others."""
    config = row.get("toolConfig")
    if isinstance(config, dict) and config.keys() == {"tools"} and not row.get("tools"):
        specs = [
            tool.get("toolSpec") if tool.keys() == {"toolSpec"} else None for tool in objects(config["tools"]) or ()
        ]
        tools = [
            {**spec, "input_schema": _json_of(spec.get("inputSchema"))} for spec in specs if isinstance(spec, dict)
        ]
        listed = tools if tools and len(tools) == len(specs) else None
    else:
        listed = objects(row.get("tools"))
    if listed is None or not all("input_schema" in tool and "function" not in tool for tool in listed):
        return None
    keys = {"name", "description", "input_schema", "inputSchema", "cache_control", "type"}
    if not all(tool.keys() <= keys and tool.get("type", "custom") == "custom" for tool in listed):
        return None
    return [{"type": "function", "function": _function(tool)} for tool in listed]


def _json_of(schema: Any) -> Any:
    return schema["json"] if isinstance(schema, dict) and schema.keys() == {"json"} else schema


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    named = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {**named, "parameters": tool["input_schema"]}


# ---- public sets


def _xlam(row: Row) -> Row | None:
    """xlam and APIGen: a query, the calls that answer it, and the tools, these two as JSON text."""
    calls = _parsed(row.get("answers"))
    if not isinstance(row.get("query"), str) or is_ours(row) or "tools" not in row or objects(calls) is None:
        return None
    if not all(call.keys() == {"name", "arguments"} for call in calls):
        return None
    functions = [{"name": call["name"], "arguments": arguments_text(call["arguments"])} for call in calls]
    answer = {"role": "assistant", "content": None, "function_call": functions}
    messages = [{"role": "user", "content": row["query"]}, answer]
    return {**without(row, "query", "answers"), "messages": messages}


def _parsed(value: Any) -> Any:
    try:
        return strict_json.parse(value, long_integers=True) if isinstance(value, str) else value
    except strict_json.BadJson:
        return None


def _conversation(row: Row) -> Row | None:
    """A conversation: pairs of a question and its answer, or messages as OpenAI has them."""
    turns = objects(row.get("conversation"))
    if turns is None or is_ours(row):
        return None
    if all({"role", "content"} <= turn.keys() for turn in turns):
        return {**without(row, "conversation"), "messages": turns}
    if all({"from", "value"} <= turn.keys() for turn in turns):
        return {**without(row, "conversation"), "conversations": turns}
    pair = next(
        (pair for pair in _PAIRS if all(set(pair) <= turn.keys() <= _OF_PAIRS | set(pair) for turn in turns)), None
    )
    if pair is None:
        return None
    return {**without(row, "conversation"), "messages": turn_lists.pairs_as_messages(turns, *pair)}


class _Form(NamedTuple):
    """A form, the column that tells of it, and what rewrites a row of it."""

    name: str
    mark: str
    rewritten: Callable[[Row], Row | None]


_FORMS: Final = (
    _Form("contents", "contents", gemini.rewritten),
    _Form("query_and_calls", "answers", _xlam),
    _Form("conversation", "conversation", _conversation),
    _Form("glaive", "chat", glaive.rewritten),
    _Form("blocks", "messages", _blocks),
)
# What the report says of each form.
SAYS: Final = {
    "contents": "contents of parts, systemInstruction and functionDeclarations were read as messages and tools.",
    "query_and_calls": "query and answers were read as a question and the calls that answer it.",
    "conversation": "conversation was read as messages.",
    "glaive": "chat was read as messages and calls, the functions of system as tools.",
    "blocks": "Blocks of text, reasoning, calls and results (tool_use, toolUse, toolResult, …) were read as messages.",
}
