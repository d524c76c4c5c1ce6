"""What a training row may look like: the keys of each shape, and the five canonical formats that the trainer reads.

Rows are plain dicts as parsed from JSON. `normalise` trusts them: `shared.rows.rules.check_row` is the gate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from shared.contract.spec import Format
from shared.rows.arguments import is_encoded_again, plain
from shared.rows.loss_flags import REASONING, reasoning_of, weight_of
from shared.rows.shapes import Row, Shape

Message = dict[str, Any]

FORMAT_OF: dict[Shape, Format] = {
    "chat": "chat",
    "prompt_completion": "prompt_completion",
    "text": "text",
    "openai_preference": "preference",
    "chosen_rejected": "preference",
    "kto": "kto",
    "conversational": "chat",
    "sharegpt": "chat",
    "alpaca": "chat",
}

KEYS: dict[Shape, frozenset[str]] = {
    "chat": frozenset({"messages", "tools", "parallel_tool_calls", "functions", "system"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "openai_preference": frozenset({"input", "preferred_completion", "non_preferred_completion"}),
    "chosen_rejected": frozenset({"messages", "prompt", "conversations", "chosen", "rejected", "tools", "system"}),
    "kto": frozenset({"messages", "prompt", "completion", "label", "system", "tools"}),
    "conversational": frozenset({"prompt", "completion", "tools"}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history", "tools", REASONING}),
}

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "function-call": "function_call",
    "tool_call": "function_call",
}


def normalise(row: Row, shape: Shape) -> Row:
    """Turn a checked row into its canonical form. Pure; normalising a canonical row gives it back.

    Canonical rows: `{"messages", "tools"?}` · `{"prompt", "completion"}` · `{"text"}` ·
    `{"messages", "tools"?, "chosen", "rejected"}` · `{"messages", "completion", "label"}`.
    Messages carry `role` (system, user, assistant, tool), `content` (always a string), and where given
    `reasoning_content`, `name`, `weight`, `tool_calls` (arguments stay JSON text), `tool_call_id`.
    """
    return _NORMALISERS[shape](row)


def normal_messages(value: Any, *, role: str = "user") -> list[Message]:
    """Canonical messages from a string (one message of `role`), one message, or a list, OpenAI's or ShareGPT's."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    items = value if isinstance(value, list) else [value]
    if items and "from" in items[0]:
        items = [_from_sharegpt(item) for item in items]
    return _linked([_message(item) for item in items])


def preference_pair(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """Split a chosen_rejected row into (input, chosen, rejected).

    Full conversations on both sides (an implicit or a repeated prompt) lose their shared beginning to the input.
    """
    key = next((key for key in ("prompt", "messages", "conversations") if row.get(key) is not None), None)
    prompt = normal_messages(row[key]) if key else []
    chosen, rejected = (normal_messages(row[side], role="assistant") for side in ("chosen", "rejected"))
    size = len(prompt)
    if size and chosen[:size] == prompt == rejected[:size]:
        chosen, rejected = chosen[size:], rejected[size:]
    shared = chosen[:-1] if chosen[:-1] == rejected[:-1] else []
    return _asked(prompt, shared), chosen[len(shared) :], rejected[len(shared) :]


def _asked(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt and the beginning that both sides share, without what stands in both."""
    if shared[len(shared) - len(prompt) :] == prompt:
        return shared
    if shared and prompt[-len(shared) :] == shared:
        return prompt
    return prompt + shared


def sharegpt_tools(value: Any) -> list[Any]:
    """Tools of a ShareGPT row: a list or JSON text of one; bare functions get OpenAI's wrapper."""
    return wrapped_tools(json.loads(value) if isinstance(value, str) else value)


def wrapped_tools(tools: list[dict[str, Any]]) -> list[Any]:
    """Tools with OpenAI's wrapper; the Responses API writes a tool's type among the keys of its function."""
    return [tool if "function" in tool else {"type": "function", "function": _bare(tool)} for tool in tools]


def _bare(function: dict[str, Any]) -> dict[str, Any]:
    is_typed = function.get("type") == "function"
    return {key: value for key, value in function.items() if key != "type"} if is_typed else function


def _chat(row: Row) -> Row:
    functions = [{"type": "function", "function": function} for function in row.get("functions") or ()]
    return _with_tools({"messages": _with_system(row, normal_messages(row["messages"]))}, row.get("tools") or functions)


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages behind the text of the system column, unless they begin with that very text."""
    system = {"role": "system", "content": row.get("system")}
    return [system, *messages] if system["content"] and messages[:1] != [system] else messages


def _conversational(row: Row) -> Row:
    # Only the completion is trained, so what the assistant said in the prompt gets weight 0.
    asked = normal_messages(row["prompt"]) if row["prompt"] else []
    prompt = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in asked]
    messages = _linked(prompt + normal_messages(row["completion"], role="assistant"))
    return _with_tools({"messages": [_ordered(m) for m in messages]}, row.get("tools"))


def _sharegpt(row: Row) -> Row:
    messages = _with_system(row, normal_messages(row["conversations"]))
    return _with_tools({"messages": messages}, sharegpt_tools(row.get("tools") or []))


def _alpaca(row: Row) -> Row:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for asked, answered in row.get("history") or ():
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    thought = {REASONING: row[REASONING]} if row.get(REASONING) else {}
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"], **thought}]
    return _with_tools({"messages": messages}, sharegpt_tools(row.get("tools") or []))


def _openai_preference(row: Row) -> Row:
    chosen, rejected = normal_messages(row["preferred_completion"]), normal_messages(row["non_preferred_completion"])
    asked = row["input"]
    return _with_tools({"messages": _unweighted(normal_messages(asked["messages"]))}, asked.get("tools")) | {
        "chosen": _unweighted(chosen)[0],
        "rejected": _unweighted(rejected)[0],
    }


def _chosen_rejected(row: Row) -> Row:
    asked, chosen, rejected = (_unweighted(messages) for messages in preference_pair(row))
    tools = sharegpt_tools(row.get("tools") or [])
    return _with_tools({"messages": _with_system(row, asked)}, tools) | {"chosen": chosen[0], "rejected": rejected[0]}


def _kto(row: Row) -> Row:
    asked = normal_messages(row["messages"] if row.get("messages") is not None else row["prompt"])
    completion = normal_messages(row["completion"], role="assistant")
    tools = sharegpt_tools(row.get("tools") or [])
    return _with_tools({"messages": _with_system(row, _unweighted(asked))}, tools) | {
        "completion": _unweighted(completion)[0],
        "label": row["label"],
    }


def _prompt_completion(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _text(row: Row) -> Row:
    return {"text": row["text"]}


_NORMALISERS: dict[Shape, Callable[[Row], Row]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "openai_preference": _openai_preference,
    "chosen_rejected": _chosen_rejected,
    "kto": _kto,
    "conversational": _conversational,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}

_CANONICAL_ROLE = {"developer": "system", "function": "tool"}
_MESSAGE_KEYS = ("role", "content", REASONING, "name", "weight", "tool_calls", "tool_call_id")


def _message(message: Message) -> Message:
    kept = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    kept["role"] = _CANONICAL_ROLE.get(message["role"], message["role"])
    kept["content"] = _content(message)
    if "weight" in kept:
        kept["weight"] = int(kept["weight"])
    if kept.get(REASONING) == "":
        del kept[REASONING]
    if kept.get("tool_calls") == []:
        del kept["tool_calls"]
    if message.get("function_call"):
        calls = message["function_call"]
        calls = calls if isinstance(calls, list) else [calls]
        kept["tool_calls"] = [{"id": "", "type": "function", "function": call} for call in calls]
    if "tool_calls" in kept:
        kept["tool_calls"] = [_plain_call(call) for call in kept["tool_calls"]]
    return _ordered(kept)


def _plain_call(call: Row) -> Row:
    function = call["function"]
    if not is_encoded_again(function["arguments"]):
        return call
    return {**call, "function": {**function, "arguments": plain(function["arguments"])}}


def _content(message: Message) -> str:
    content = message.get("content")
    if content is None:
        return str(message.get("refusal") or "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _ordered(message: Message) -> Message:
    return {key: message[key] for key in _MESSAGE_KEYS if key in message}


def _linked(messages: list[Message]) -> list[Message]:
    """Give ids to calls of the deprecated `function_call` form, and to the answers that follow them in order."""
    waiting: list[str] = []
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            if not call.get("id"):
                call["id"] = f"call_{index}_{number}" if number else f"call_{index}"
                waiting.append(call["id"])
        if message["role"] == "tool" and not message.get("tool_call_id") and waiting:
            message["tool_call_id"] = waiting.pop(0)
    return messages


def _unweighted(messages: list[Message]) -> list[Message]:
    """Preference losses know no per-message weight."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _with_tools(row: Row, tools: Any) -> Row:
    return {**row, "tools": tools} if tools else row


def _from_sharegpt(item: Row) -> Message:
    role = SHAREGPT_ROLES[item["from"]]
    asked = weight_of(item)
    weight = {"weight": asked} if asked is not None and role in {"assistant", "function_call"} else {}
    if role != "function_call":
        reasoning = reasoning_of(item) if role == "assistant" else None
        thought = {} if reasoning is None else {REASONING: reasoning}
        return {"role": role, "content": item["value"], **thought, **weight}
    value = json.loads(item["value"])
    functions = [
        {"name": call["name"], "arguments": arguments_text(call["arguments"])}
        for call in (value if isinstance(value, list) else [value])
    ]
    return {"role": "assistant", "content": None, "function_call": functions, **weight}


def arguments_text(arguments: str | dict[str, Any]) -> str:
    """Arguments as JSON text, whether they are written as text or as an object."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
