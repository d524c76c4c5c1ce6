"""Messages as other tools write them, rewritten into OpenAI's form: flags, reasoning, calls, roles, parts of content.

Sources: OpenAI's objects as `model_dump` writes them, and its Responses API; the chat templates of the Hugging Face hub
(calls with an object as arguments and without ids, `reasoning_content`); axolotl (`train`, `training`), ms-swift
(`loss`, roles `tool_call` and `tool_response`), LLaMA-Factory (`function_call`, `observation`); Anthropic and Mistral
(parts of type `thinking`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from shared.rows import response_items, strict_json
from shared.rows.arguments import calls_in
from shared.rows.formats import SHAREGPT_ROLES, Message, arguments_text, wrapped_tools
from shared.rows.loss_flags import REASONING, REASONING_KEYS, TRUTHS, truth_of, weight_of

_PLAIN: Final = frozenset({"role", "content", "name"})
_ROLES: Final = ("user", "assistant", "system", "developer")
_OF_COHERE: Final = {"System": "system", "User": "user", "Chatbot": "assistant", "Tool": "tool"}
_CALLERS: Final = frozenset({"tool_call", "function_call"})
_RESULTS: Final = frozenset({"tool_response", "observation"})
_READ: Final = frozenset(
    {*_PLAIN, "weight", "tool_calls", "function_call", "refusal", "tool_call_id", *REASONING_KEYS, *TRUTHS}
)
# They say who wrote a message and when; nothing of it is for a model to read.
_NOTES: Final = frozenset(
    {"id", "message_id", "uuid", "index", "turn", "turn_id", "timestamp", "time", "created", "created_at", "date"}
    | {"model", "finish_reason", "stop_reason", "usage", "metadata", "meta", "tokens", "token_count"}
    | {"language", "lang", "annotations"}
    | {"toxic", "redacted", "turn_identifier", "country", "state", "hashed_ip", "header"}  # WildChat
)
_ARGUMENTS: Final = ("arguments", "parameters", "args", "input")
# Who speaks, under the names that are read in small letters.
_NAMED: Final = {
    "role": frozenset({*_ROLES, "tool", "function", *_CALLERS, *_RESULTS}),
    "from": frozenset(SHAREGPT_ROLES),
}
_TEXT_PARTS: Final = frozenset({"input_text", "output_text"})


class Rewritten(NamedTuple):
    """Messages in OpenAI's form, the forms that they were read from, and keys that were left out."""

    messages: list[Any]
    forms: tuple[str, ...]
    dropped: tuple[str, ...]


def rewritten(messages: list[Any]) -> Rewritten | None:
    """The messages in OpenAI's form; None where they are in it already. What has no meaning here stays as it is."""
    for message in messages:  # nearly all messages of nearly all files
        if type(message) is not dict or len(message) != 2 or message.get("role") not in _ROLES:
            break
        if type(message.get("content")) is not str:
            break
    else:
        return None
    items = response_items.messages(messages)
    small = None if items is not None else _in_small_letters(messages)
    messages = small or messages
    if items is None and small is None and all(map(_is_plain, messages)):
        return None
    reading = _Reading()
    if small is not None:
        reading.forms.add("capitals")
    if items is not None:
        reading.dropped |= response_items.unreadable(messages)
        messages = items
        reading.forms.add("response_items")
    if any(isinstance(message, dict) and message.get("role") == "Chatbot" for message in messages):
        messages = [_with_role_of_ours(message) for message in messages]
        reading.forms.add("cohere_roles")
    for message in messages:
        reading.add(message)
    return Rewritten(reading.made, tuple(sorted(reading.forms)), tuple(sorted(reading.dropped)))


def _in_small_letters(messages: list[Any]) -> list[Any] | None:
    """The messages or items with known speakers in small letters; None where they are so, or are Cohere's own."""
    if not any(map(_in_capitals, messages)) or any(_role_of(message) == "Chatbot" for message in messages):
        return None
    return [_small(message) if _in_capitals(message) else message for message in messages]


def _role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _in_capitals(message: Any) -> bool:
    if type(message) is not dict:
        return False
    key = "role" if "role" in message else "from"
    speaker = message.get(key)
    if type(speaker) is not str or speaker in _NAMED[key]:
        return False
    return speaker.strip().casefold() in _NAMED[key]


def _small(message: Message) -> Message:
    key = "role" if "role" in message else "from"
    return {**message, key: message[key].strip().casefold()}


def _with_role_of_ours(message: Any) -> Any:
    """A message of Cohere's with OpenAI's name of its role."""
    role = message.get("role") if isinstance(message, dict) else None
    return {**message, "role": _OF_COHERE[role]} if isinstance(role, str) and role in _OF_COHERE else message


def _is_plain(message: Any) -> bool:
    if not isinstance(message, dict) or "role" not in message:
        return True
    role = message["role"]
    return message.keys() <= _PLAIN and type(message.get("content")) is str and type(role) is str and role in _ROLES


class _Reading:
    """A pass over one conversation."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.forms: set[str] = set()
        self.dropped: set[str] = set()
        self.waiting: list[str] = []  # ids of calls without an answer yet
        self.calling = False  # the last message made is calls of roles that hold nothing else

    def add(self, message: Any) -> None:
        if _is_plain(message):
            self.made.append(message)
            self.calling = False
            return
        role = message["role"]
        if isinstance(role, str) and role in _CALLERS:
            self._call(message)
            return
        self.calling = False
        message = self._without_notes(message)
        if message.get("refusal") == "":  # as some clients dump it beside content
            del message["refusal"]
        if message.get("prefix") is False:  # Mistral's answers have it: nothing is to be continued
            del message["prefix"]
        if role != "assistant" and message.get("weight") == 0 and type(message["weight"]) is not bool:
            del message["weight"]  # Together's rows say so of each question: it is not trained in any case
        if isinstance(role, str) and role in _RESULTS:
            message["role"] = "function"
            self.forms.add("call_roles")
        self._flags(message)
        self._parts(message)
        self._reasoning(message)
        self._calls(message)
        self.made.append(message)

    def _without_notes(self, message: Message) -> Message:
        read = _READ if message["role"] == "assistant" else {*_PLAIN, "tool_call_id", "weight"}
        empty = {key for key in message.keys() - read if message[key] in (None, "", [], {})}
        notes = empty | {key for key in message.keys() - _READ if key in _NOTES}
        self.dropped |= {key for key in notes if message[key] not in (None, "", [], {})}
        return {key: value for key, value in message.items() if key not in notes}

    def _call(self, message: Message) -> None:
        """A message that is nothing but a call; several in a row are parallel calls."""
        calls = calls_in(message["content"]) if isinstance(message.get("content"), str) else None
        if calls is None or message.keys() - {"role", "content", "weight", *TRUTHS}:
            self.made.append(message)
            return
        self.forms.add("call_roles")
        functions = [{"name": call["name"], "arguments": arguments_text(call["arguments"])} for call in calls]
        weight = weight_of(message)
        if self.calling and self.made[-1].get("weight") == weight:
            self.made[-1]["function_call"] += functions
            return
        message = {"role": "assistant", "content": None, "function_call": functions}
        self.made.append(message if weight is None else {**message, "weight": weight})
        self.calling = True

    def _flags(self, message: Message) -> None:
        flags = [key for key in TRUTHS if truth_of(message.get(key)) is not None]
        if not flags:
            return
        weight = weight_of(message)
        if message["role"] == "assistant":
            message["weight"] = weight
        elif weight != 0:
            return  # it asks to train what is not the assistant's: refused by that name
        self.forms.add("train_flag")
        for key in flags:
            del message[key]

    def _parts(self, message: Message) -> None:
        parts = message.get("content")
        if not isinstance(parts, list):
            return
        kept: list[Any] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                kept.append({"type": "text", "text": part["text"]})
            elif kind == "refusal" and message["role"] == "assistant" and isinstance(part.get("refusal"), str):
                kept.append({"type": "text", "text": part["refusal"]})
            elif kind == "thinking" and message["role"] == "assistant" and not _named(message):
                message[REASONING] = _thought(part.get("thinking"))
            else:
                kept.append(part)
        if kept != parts:
            self.forms.add("parts")
            message["content"] = kept

    def _reasoning(self, message: Message) -> None:
        if message["role"] == "assistant" and (detailed := _detailed(message.get("reasoning_details"))):
            if not _named(message):
                message["reasoning"] = detailed
            if _named(message) and all(message[name].strip() == detailed.strip() for name in _named(message)):
                del message["reasoning_details"]
        named = _named(message)
        for key in [key for key in REASONING_KEYS if key in message and message[key] in (None, "")]:
            del message[key]
        if message["role"] == "assistant" and len({message[key] for key in named}) == 1 and named != [REASONING]:
            self.forms.add("reasoning")
            message[REASONING] = message[named[0]]
            for name in named:
                if name != REASONING:
                    del message[name]

    def _calls(self, message: Message) -> None:
        calls = message.get("tool_calls")
        listed = _listed_calls(calls)
        if listed is not None:
            calls = message["tool_calls"] = listed
            self.forms.add("listed_calls")
        if message["role"] in ("tool", "function") and isinstance(message.get("content"), dict):
            message["content"] = json.dumps(message["content"], ensure_ascii=False)
            self.forms.add("results_as_objects")
        if isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls):
            plain = [self._plain_call(call) for call in calls]
            if any(call.get("id") for call in plain):
                message["tool_calls"] = plain
                self.waiting = [call["id"] for call in plain if isinstance(call.get("id"), str)]
            elif not message.get("function_call"):
                self.forms.add("calls_without_ids")
                del message["tool_calls"]
                message["function_call"] = [call.get("function") for call in plain]
        if isinstance(message.get("function_call"), dict):
            message["function_call"] = self._function(message["function_call"])
        if message["role"] == "tool" and not message.get("tool_call_id"):
            message.pop("tool_call_id", None)
            if self.waiting:
                message["tool_call_id"] = self.waiting.pop(0)
            elif any(isinstance(earlier, dict) and earlier.get("function_call") for earlier in self.made):
                message["role"] = "function"
            else:
                return  # nobody asked for it
            self.forms.add("calls_without_ids")

    def _plain_call(self, call: dict[str, Any]) -> dict[str, Any]:
        if "function" not in call and isinstance(call.get("name"), str):
            flat = {key: call[key] for key in ("name", *_ARGUMENTS) if key in call}
            call = {**{key: value for key, value in call.items() if key not in flat}, "function": flat}
            self.forms.add("bare_calls")
        kept = {key: value for key, value in call.items() if key != "index"}
        kept.setdefault("type", "function")
        if kept["type"] is None:
            kept["type"] = "function"
        if isinstance(kept.get("function"), dict):
            kept["function"] = self._function(kept["function"])
        return kept

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        named = [key for key in _ARGUMENTS if key in function]
        if len(named) == 1 and named != ["arguments"]:  # Llama's own parameters, Anthropic's input
            self.forms.add("bare_calls")
            function = {"arguments" if key == named[0] else key: value for key, value in function.items()}
        if not isinstance(function.get("arguments"), dict):
            return function
        self.forms.add("arguments_as_object")
        return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _listed_calls(calls: Any) -> list[Any] | None:
    """Calls that are one object, or JSON text of a list, as a list; None for all others."""
    if isinstance(calls, dict):
        return [calls] if calls else None
    value = parsed(calls) if isinstance(calls, str) else None
    return value if isinstance(value, list) and all(isinstance(call, dict) for call in value) else None


def _named(message: Message) -> list[str]:
    return [key for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key]]


def _detailed(details: Any) -> str | None:
    """The text of OpenRouter's `reasoning_details`; None where a part of them is no text."""
    if not isinstance(details, list) or not all(isinstance(part, dict) for part in details):
        return None
    if not all(part.get("type") == "reasoning.text" and isinstance(part.get("text"), str) for part in details):
        return None
    return "".join(part["text"] for part in details)


def _thought(value: Any) -> Any:
    """The text of a part of type thinking: Anthropic's is a text, Mistral's a list of parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    return value


def tools_in_a_list(value: Any) -> list[Any] | None:
    """Tools that are one object, or objects as JSON text each, as a list; None for all others."""
    single = parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "{" else value
    if isinstance(single, dict) and ("function" in single or isinstance(single.get("name"), str)):
        return [single]
    if not isinstance(value, list) or not value or not all(isinstance(tool, str) for tool in value):
        return None
    tools = [parsed(tool) for tool in value]
    return tools if all(isinstance(tool, dict) for tool in tools) else None


def parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return None


def bare_tools(value: Any) -> list[Any] | None:
    """Tools with OpenAI's wrapper; None where they have it, or are no list of functions."""
    if not isinstance(value, list) or not value or not all(isinstance(tool, dict) for tool in value):
        return None
    if not any("function" not in tool and isinstance(tool.get("name"), str) for tool in value):
        return None
    return wrapped_tools(value)


def listed(keys: Iterable[str], column: str) -> tuple[str, ...]:
    """Names of message keys as the report counts them."""
    return tuple(f"{column}[].{key}" for key in keys)
