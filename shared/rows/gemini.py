"""Rows and logged requests of Google's Gemini and Vertex AI, rewritten into messages and tools. Pure, never raises.

Sources: the references of `contents`, `parts`, `systemInstruction`, `functionDeclarations`, and of preference tuning.
"""

from __future__ import annotations

import json
from typing import Any, Final

from shared.rows.formats import Message, arguments_text
from shared.rows.parts import is_ours, objects, text_of, without
from shared.rows.shapes import Row


def request(body: Row) -> Row | None:
    """Messages, system text and tools of a request to Gemini; None where one of its contents has no parts."""
    asked = ("contents", "tools", "systemInstruction", "system_instruction")
    contents = body.get("contents")
    listed = contents if isinstance(contents, list) else [contents]
    return rewritten({key: body[key] for key in asked if body.get(key)} | {"contents": listed})


def rewritten(row: Row) -> Row | None:
    """A row of `contents` as messages, or as a pair where two answers are rated; None where it has no parts."""
    turns = objects(row.get("contents"))
    if turns is None or is_ours(row) or not all(isinstance(turn.get("parts"), list) for turn in turns):
        return None
    messages = [message for turn in turns for message in _turn(turn)]
    rated = _rated(row.get("completions"))
    if rated is not None:
        made = without(row, "contents", "completions") | {"prompt": messages, **rated}
    else:
        made = without(row, "contents") | {"messages": messages}
    for key in ("systemInstruction", "system_instruction"):
        system = row.get(key)
        text = system if isinstance(system, str) else text_of(system.get("parts")) if isinstance(system, dict) else None
        if text is not None and not row.get("system"):
            made = without(made, key) | {"system": text}
    tools = _declared(row.get("tools"))
    return made if tools is None else made | {"tools": tools}


def _rated(completions: Any) -> Row | None:
    """The better and the worse of two answers with a score each, as Vertex AI's preference tuning has them."""
    listed = objects(completions)
    if listed is None or len(listed) != 2 or not all(each.keys() == {"score", "completion"} for each in listed):
        return None
    scores = [each["score"] for each in listed]
    answers = [each["completion"] for each in listed]
    if not all(type(score) in (int, float) for score in scores) or scores[0] == scores[1]:
        return None
    if not all(isinstance(answer, dict) and isinstance(answer.get("parts"), list) for answer in answers):
        return None
    better, worse = answers if scores[0] > scores[1] else reversed(answers)
    return {"chosen": _turn(better), "rejected": _turn(worse)}


_ROLES: Final = (("model", "assistant"), ("function", "user"), (None, "user"))


def _turn(turn: dict[str, Any]) -> list[Message]:
    role, further = turn.get("role", "user"), without(turn, "role", "parts")
    role = next((ours for theirs, ours in _ROLES if role == theirs), role)
    rest: list[Any] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    thoughts = ""
    for part in map(_bare_part, turn["parts"]):
        kind = next(iter(part)) if isinstance(part, dict) and len(part) == 1 else None
        body: Any = part[kind] if kind is not None else None
        if kind in {"functionCall", "function_call"} and _has_only(body, "id", "name", "args") and role == "assistant":
            calls.append(body)
        elif (
            kind in {"functionResponse", "function_response"} and _has_only(body, "id", "name", "response") and not rest
        ):
            results.append({**further, **_result(body)})
        elif kind == "text" and isinstance(body, str) and not calls:
            rest.append({"type": "text", "text": body})
        elif _is_thought(part) and role == "assistant":
            thoughts += part["text"]
        else:
            rest.append(part)
    text = text_of(rest)
    message: Message = {**further, "role": role, "content": rest if rest and text is None else text}
    message |= _calls(calls)
    if thoughts:
        message["reasoning_content"] = thoughts
    return results if results and not rest else [*results, message]


def _bare_part(part: Any) -> Any:
    """A part without the signature of a thought and the nulls of `model_dump`, which say nothing."""
    if not isinstance(part, dict):
        return part
    bare = without(part, "thoughtSignature", "thought_signature")
    return {key: value for key, value in bare.items() if value is not None and (key, value) != ("thought", False)}


def _calls(calls: list[dict[str, Any]]) -> Message:
    functions = [{"name": call.get("name"), "arguments": arguments_text(call.get("args") or {})} for call in calls]
    if not calls or not all(isinstance(call.get("id"), str) and call["id"] for call in calls):
        return {"function_call": functions} if calls else {}
    named = zip(calls, functions, strict=True)
    return {"tool_calls": [{"id": call["id"], "type": "function", "function": function} for call, function in named]}


def _result(body: dict[str, Any]) -> Message:
    content = json.dumps(body.get("response"), ensure_ascii=False)
    named = {"role": "tool", "tool_call_id": body["id"]} if body.get("id") else {"role": "function"}
    return {**named, "name": body.get("name"), "content": content}


def _has_only(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and value.keys() <= set(keys)


def _is_thought(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"text", "thought"}
        and part["thought"] is True
        and isinstance(part["text"], str)
    )


_JSON_SCHEMAS: Final = ("parametersJsonSchema", "parameters_json_schema")


def _declared(tools: Any) -> list[Any] | None:
    listed = objects([tools] if isinstance(tools, dict) else tools)
    names = ("functionDeclarations", "function_declarations")
    if listed is None or not all(len(tool) == 1 and next(iter(tool)) in names for tool in listed):
        return None
    groups = [next(iter(tool.values())) for tool in listed]
    if not all(isinstance(group, list) for group in groups):
        return None
    return [{"type": "function", "function": _with_parameters(function)} for group in groups for function in group]


def _with_parameters(function: Any) -> Any:
    """A declaration whose schema is JSON Schema, under the name that templates read."""
    named = [key for key in _JSON_SCHEMAS if isinstance(function, dict) and key in function]
    if len(named) != 1 or function.get("parameters") is not None:
        return function
    return {"parameters" if key == named[0] else key: value for key, value in function.items() if key != "parameters"}
