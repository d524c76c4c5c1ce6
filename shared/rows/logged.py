"""Requests and their responses as services and their watchers log them, read as conversations. Pure, never raises.

Sources: OpenAI's stored completions (`messages`, `choices`), its Responses (`input`, `output`, `instructions`) and the
lines that people make of batches; Anthropic's and Vertex AI's requests beside their responses; the exports of Helicone
(`request_body`), Langfuse (`input`, `output`) and LangSmith (`inputs`, `outputs`); Nemotron's first post-training set.
Only what was answered is trained: earlier answers of the conversation have a log of their own.
"""

from __future__ import annotations

from typing import Any, Final

from shared.rows import gemini, langchain, response_items
from shared.rows.formats import Message
from shared.rows.shapes import MARKS, Row

_ASKED: Final = ("request", "request_body", "requestBody", "inputs", "input")
_ANSWERED: Final = ("choices", "response", "response_body", "responseBody", "outputs", "output")
COLUMNS: Final = frozenset({*_ASKED, *_ANSWERED, "instructions"})
_STATED: Final = ("system", "tools", "functions", "toolConfig", "systemInstruction", "system_instruction")
_CUTS: Final = frozenset(
    {"length", "max_tokens", "content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii"}
    | {"malformed_function_call", "model_context_window_exceeded", "pause_turn"}
)
_SPEAKERS: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
SAYS: Final = {"logged": "A request and its response were read as messages; of them the response is trained."}


def read(row: Row) -> tuple[Row, tuple[str, ...]]:
    """The row as messages whose last ones are trained, and the form that it was read from."""
    answered = next((key for key in _ANSWERED if key in row), None)
    made = None if answered is None or "instruction" in row else _rewritten(row, answered)
    return (row, ()) if made is None else (made, ("logged",))


def _rewritten(row: Row, answered: str) -> Row | None:
    asked = "messages" if answered == "choices" else next((key for key in _ASKED if key in row), None)
    if asked not in row or any(row.get(mark) is not None for mark in MARKS if mark != asked):
        return None
    request = _request(row[asked], row)
    answer = _answer(row[answered]) if request else None
    if request is None or not answer:
        return None
    before, stated = request
    if answer[: len(before)] == before and len(answer) > len(before):  # the whole conversation, once more
        answer = answer[len(before) :]
    if before[-1]["role"] == "assistant" or not all(map(_is_answer, answer)):
        return None  # it has its answer already, or the response is none
    messages = [*map(_untrained, before), *answer]
    rest = {key: value for key, value in row.items() if key not in {asked, answered, "instructions"}}
    return {**stated, **rest, "messages": messages}


def _request(value: Any, row: Row) -> tuple[list[Message], Row] | None:
    """What was asked, as messages, and what stood beside them: system text and tools."""
    body = value if isinstance(value, dict) else {"messages": value}
    if "contents" in body:
        body = gemini.request(body) or {}
        if body.keys() & {"systemInstruction", "system_instruction"}:
            return None  # it is more than text
    spoken = next((body[key] for key in ("messages", "input") if body.get(key)), None)
    messages = _messages(spoken)
    if isinstance(spoken, str) and _is_of_responses(value, row):
        messages = [{"role": "user", "content": spoken}]
    if not messages:
        return None
    stated = {key: body[key] for key in _STATED if body.get(key) and not row.get(key)}
    instructions = body.get("instructions", row.get("instructions"))
    if instructions and ("system" in stated or row.get("system") or not isinstance(instructions, str)):
        return None
    return messages, {**stated, **({"system": instructions} if instructions else {})}


def _is_of_responses(value: Any, row: Row) -> bool:
    """Whether a text is the input of OpenAI's Responses: items answer it."""
    response = row if isinstance(value, str) else row.get("response")
    items = response.get("output") if isinstance(response, dict) else None
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) and "type" in item for item in items)


def _messages(value: Any) -> list[Message] | None:
    """Messages, items of the Responses API, or LangChain's messages."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    items = response_items.messages(value)
    if items is None:
        items = value if all("role" in item for item in value) else langchain.messages(value)
    if items is None or not all(isinstance(item.get("role"), str) and item["role"] in _SPEAKERS for item in items):
        return None
    return items


def _answer(value: Any) -> list[Message] | None:
    """The messages that a response holds; None where it holds none, or several to choose from."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}] if value.strip() else None
    if isinstance(value, list):
        chosen = len(value) == 1 and isinstance(value[0], dict) and "message" in value[0]
        if chosen and _is_cut(value[0]):
            return None
        return _messages([value[0]["message"]] if chosen else value)
    return _said(value) if isinstance(value, dict) else None


def _said(value: dict[str, Any]) -> list[Message] | None:
    """The messages of a response that is an object: a message, or what a service puts around it."""
    if _is_cut(value):
        return None
    if "role" in value or {"type", "data"} == value.keys() or "lc" in value:
        own = {key: value[key] for key in value if key in {"role", "content", "name"}}
        return _messages([own if value.get("type") == "message" and "usage" in value else value])
    if isinstance(value.get("candidates"), list) and len(value["candidates"]) == 1:
        candidate = value["candidates"][0]
        whole = isinstance(candidate, dict) and not _is_cut(candidate)
        return _content(candidate.get("content")) if whole else None
    inside = next((value[key] for key in ("choices", "body", "output", "messages", "message") if value.get(key)), None)
    return _answer(inside) if isinstance(inside, list | dict) else None


def _content(content: Any) -> list[Message] | None:
    """The messages of one of Gemini's contents; None where it holds no parts."""
    spoken = {**content, "role": content.get("role") or "model"} if isinstance(content, dict) else content
    made = gemini.request({"contents": spoken})
    return None if made is None else _messages(made["messages"])


def _is_cut(answer: dict[str, Any]) -> bool:
    """Whether an answer ended at a limit: its end would be learnt in the middle of a sentence."""
    ended = (answer.get(key) for key in ("finish_reason", "stop_reason", "finishReason", "stopReason"))
    return any(isinstance(reason, str) and reason.casefold() in _CUTS for reason in ended)


def _is_answer(message: Message) -> bool:
    return message["role"] in {"assistant", "tool"}


def _untrained(message: Message) -> Message:
    return {**message, "weight": 0} if message["role"] == "assistant" else message
