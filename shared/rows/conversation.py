"""The rules of a conversation: roles, content, tool calls, weights, order. Rows are judged in `shared.rows.rules`."""

from __future__ import annotations

import difflib
import itertools
from typing import Any

from shared.rows import formats
from shared.rows.arguments import BadArguments, calls_in, is_rounded, object_text, slip_of
from shared.rows.columns import is_media
from shared.rows.findings import RowFindings, shown, too_deep
from shared.rows.items import check_item_keys, parts_size, refuse_flag, refuse_medium, refuse_other_calls
from shared.rows.loss_flags import (
    FLAGS,
    LIKE_REASONING,
    REASONING,
    TRUTHS,
    asks_to_train,
    names_loss,
    truth_of,
    weight_of,
)
from shared.rows.shapes import Row
from shared.rows.slips import is_python

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROUNDED = (
    "A decimal in arguments has more digits than programs keep (17); templates that take arguments as an object write"
    " it rounded. Write it as text to keep all digits."
)
ENCODED_TWICE = "Arguments are JSON of JSON; the object inside was read. Call json.dumps once."

_SPEAKERS = ("type", "author", "speaker", "sender", "from")
_PLAIN = frozenset({"role", "content", "name"})
# What a role written in capitals, or as another tool names it, may mean.
_ROLE_OF = {
    **formats.SHAREGPT_ROLES,
    "chatbot": "assistant",
    "developer": "developer",
    "ai": "assistant",
    "prompter": "user",
    **dict.fromkeys(("ipython", "tool_result", "tool_results", "environment", "function_call_output"), "tool"),
}
_KEYS_OF_ROLE: dict[str, frozenset[str]] = {
    **dict.fromkeys(("system", "developer", "user", "function"), _PLAIN),
    "assistant": _PLAIN | {"weight", "tool_calls", "function_call", "refusal", REASONING},
    "tool": _PLAIN | {"tool_call_id"},
}


class Conversation:
    """A pass over one list of messages, remembering tool calls and what would be trained."""

    __slots__ = ("by_tag", "calls", "empty", "findings", "legacy_calls", "tool_names", "trainable", "trained")

    def __init__(
        self, findings: RowFindings, *, tool_names: frozenset[str] | None = None, trained: bool = True
    ) -> None:
        self.findings = findings
        self.tool_names = tool_names
        self.trained = trained
        self.trainable = 0
        self.empty: list[str] = []
        self.calls: set[str] = set()
        self.legacy_calls = 0
        self.by_tag = False  # an item spells a call in tags, which nobody could read

    def check(self, messages: Any, at: str) -> None:
        findings = self.findings
        if not isinstance(messages, list) or not messages:
            remedy = slip_of(messages)
            remedy = f", {remedy}" if remedy else "; use a list with at least one message"
            findings.refuse(at, "wrong_type", f"{at} is {shown(messages)}{remedy}.")
            return
        earlier = len(findings.problems)
        findings.messages += len(messages)
        read = self._sharegpt if isinstance(messages[0], dict) and "from" in messages[0] else self._message
        roles = [read(message, at, index) for index, message in enumerate(messages)]
        if len(findings.problems) == earlier:
            self._check_order(roles, at)

    def _message(self, message: Any, at: str, index: int) -> str:
        findings = self.findings
        if not isinstance(message, dict):
            text = f"{at}[{index}] is {shown(message)}; use an object with role and content."
            findings.refuse(f"{at}[{index}]", "wrong_type", text)
            return ""
        role = message.get("role")
        allowed = _KEYS_OF_ROLE.get(role) if isinstance(role, str) else None
        if allowed is None:
            self._refuse_role(message, f"{at}[{index}].role")
            return ""
        assert isinstance(role, str)
        if not message.keys() <= allowed:
            self._refuse_keys(message, allowed, f"{at}[{index}]")
        content = message.get("content")
        size = len(content) if isinstance(content, str) else self._odd_content(message, role, f"{at}[{index}]")
        findings.characters += size
        if role == "assistant":
            if not isinstance(message.get(REASONING), str | None):
                text = f"{at}[{index}].{REASONING} is {shown(message[REASONING])}; use text."
                findings.refuse(f"{at}[{index}].{REASONING}", "wrong_type", text)
            self._assistant(message, size, f"{at}[{index}]")
        elif role in {"tool", "function"}:
            self._answer(message, role, f"{at}[{index}]")
        elif not size:
            findings.warn(f"{at}[{index}].content", "empty_content", "A message has empty content.")
        if "name" in message and not isinstance(message["name"], str | None):
            findings.refuse(
                f"{at}[{index}].name", "wrong_type", f"{at}[{index}].name is {shown(message['name'])}; use text."
            )
        return role

    def _refuse_role(self, message: Row, at: str) -> None:
        role = message.get("role")
        under = next((key for key in _SPEAKERS if isinstance(message.get(key), str)), None)
        if role is None and under is not None:
            text = f"{at} is missing; who speaks stands under {under} ({shown(message[under])}), write it as role."
            self.findings.refuse(at, "unknown_role", text)
            return
        known = _ROLE_OF.get(role.strip().casefold()) if isinstance(role, str) else None
        hint = f'"{known}"' if known and known in ROLES else f"one of {', '.join(ROLES)}"
        self.findings.refuse(at, "unknown_role", f"{at} is {shown(role)}; use {hint}.")

    def _refuse_keys(self, message: Row, allowed: frozenset[str], at: str) -> None:
        if message.get("weight") is not None and "weight" not in allowed:
            text = f"{at}.weight stands on a {message['role']} message; only assistant messages are trained, remove it."
            self.findings.refuse(f"{at}.weight", "invalid_weight", text)
        for key in sorted(key for key in message.keys() - allowed if message[key] is not None):
            if key in TRUTHS and truth_of(message[key]) is None:
                text = f"{at}.{key} is {shown(message[key])}; use true or false."
                self.findings.refuse(f"{at}.{key}", "wrong_type", text)
            elif (key in FLAGS or names_loss(key)) and not (key in TRUTHS and message["role"] != "assistant"):
                refuse_flag(f"{at}.{key}", self.findings)
            elif is_media(key[:80]):
                refuse_medium(f"{at}.{key[:80]}", self.findings)
            else:
                continue
            allowed = allowed | {key}
        refuse_unknown_keys(message, allowed | {"weight"}, at, self.findings)

    def _odd_content(self, message: Row, role: str, at: str) -> int:
        """Size of content that is not a plain string: parts, or nothing where something else stands in its place."""
        content = message.get("content")
        if isinstance(content, list):
            return parts_size(content, f"{at}.content", self.findings)
        if content is not None:
            self.findings.refuse(f"{at}.content", "wrong_type", f"{at}.content is {shown(content)}; use text.")
            return 0
        if role == "assistant" and isinstance(message.get("refusal"), str):
            return len(message["refusal"])
        if role != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            remedy = "use text; only an assistant message with tool_calls may leave it out"
            self.findings.refuse(f"{at}.content", "missing_content", f"{at}.content is missing or null; {remedy}.")
        return 0

    def _assistant(self, message: Row, size: int, at: str) -> None:
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            self.findings.refuse(
                f"{at}.weight", "invalid_weight", f"{at}.weight is {shown(weight)}; use 0 (do not train) or 1."
            )
        if isinstance(message.get("content"), str) and not message["content"].strip():
            size = 0
        if message.get("tool_calls") or message.get("function_call"):
            size += self._calls(message, at)
        if message.get("refusal") is not None and (not isinstance(message["refusal"], str) or message.get("content")):
            self.findings.refuse(
                f"{at}.refusal", "wrong_type", f"{at}.refusal must be text, and stand in place of content."
            )
        if weight == 0:
            return
        self.trainable += size
        if not size:
            self.empty.append(at)

    def _calls(self, message: Row, at: str) -> int:
        if message.get("function_call"):
            listed = message["function_call"]
            single = not isinstance(listed, list)
            refuse_other_calls(message, at, self.findings)
            self.legacy_calls += 1 if single else len(listed)
            if single:
                return self._function(listed, f"{at}.function_call")
            return sum(self._function(call, f"{at}.function_call[{index}]") for index, call in enumerate(listed))
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            self.findings.refuse(
                f"{at}.tool_calls", "wrong_type", f"{at}.tool_calls is {shown(calls)}; use a list of calls."
            )
            return 0
        return sum(self._call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls))

    def _call(self, call: Any, at: str) -> int:
        if not isinstance(call, dict):
            self.findings.refuse(at, "wrong_type", f"{at} is {shown(call)}; use an object with id, type and function.")
            return 0
        refuse_unknown_keys(call, frozenset({"id", "type", "function"}), at, self.findings)
        if not isinstance(call.get("id"), str) or not call["id"]:
            self.findings.refuse(
                f"{at}.id", "missing_tool_call_id", f"{at}.id is {shown(call.get('id'))}; give each call a text id."
            )
        else:
            self.calls.add(call["id"])
        if call.get("type") != "function":
            self.findings.refuse(f"{at}.type", "wrong_type", f'{at}.type is {shown(call.get("type"))}; use "function".')
        return self._function(call.get("function"), f"{at}.function")

    def _function(self, function: Any, at: str) -> int:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            self.findings.refuse(at, "wrong_type", f"{at} is {shown(function)}; use an object with name and arguments.")
            return 0
        refuse_unknown_keys(function, frozenset({"name", "arguments"}), at, self.findings)
        name, arguments = function["name"], function.get("arguments")
        if self.tool_names is not None and name not in self.tool_names:
            text = f"{at}.name is {shown(name)}, which tools does not list; add it to tools or correct the name."
            self.findings.refuse(f"{at}.name", "unknown_tool", text)
        elif self.tool_names is None:
            self.findings.warn(
                f"{at}.name",
                "call_without_tools",
                "A row calls a tool but lists no tools; the model will not see them.",
            )
        call = f"{at.removesuffix('.function')}."
        if arguments is None and any(fault.param.startswith(call) for fault in self.findings.problems):
            return 0  # they may stand under the key that was refused just now
        return len(name) + self._arguments(arguments, f"{at}.arguments")

    def _arguments(self, value: Any, at: str) -> int:
        """Characters of a call's arguments; those encoded twice count as the object that they hold."""
        try:
            if not isinstance(value, str | None):
                raise BadArguments("use the JSON text of an object (json.dumps)")
            text = object_text(value or "")
        except BadArguments as bad:
            self.findings.refuse(at, "invalid_arguments", f"{at} is {shown(value)}; {bad}.")
            return 0
        if text != value:
            self.findings.warn(at, "arguments_encoded_twice", ENCODED_TWICE)
        if is_rounded(text):
            self.findings.warn(at, "rounded_decimal", ROUNDED)
        return len(text)

    def _answer(self, message: Row, role: str, at: str) -> None:
        if role == "function":
            self._legacy_answer(message, at)
            return
        called = message.get("tool_call_id")
        if not isinstance(called, str) or called not in self.calls:
            remedy = "use the id of an earlier tool call in this conversation"
            if not self.calls and not self.legacy_calls:
                remedy = "there is no earlier tool call, add tool_calls to an assistant message before it"
            text = f"{at}.tool_call_id is {'missing' if called is None else shown(called)}; {remedy}."
            self.findings.refuse(f"{at}.tool_call_id", "unknown_tool_call_id", text)

    def _legacy_answer(self, message: Row, at: str) -> None:
        if self.legacy_calls < 1:
            role = message.get("role") or message.get("from")
            key = "role" if "role" in message else "from"
            text = f'{at}.{key} is "{role}" but no earlier message calls a function; add the call.'
            if key == "from":
                text = f"{text[:-1]} before it, as an item from function_call: JSON of name and arguments."
            if self.by_tag:
                text = (
                    f"{at} answers a call, but the <tool_call> before it cannot be read; write JSON with name and"
                    " arguments in each (json.dumps), and no text behind it."
                )
            self.findings.refuse(f"{at}.{key}", "unknown_tool_call_id", text)
        self.legacy_calls -= 1

    def _sharegpt(self, item: Any, at: str, index: int) -> str:
        name, at = at, f"{at}[{index}]"
        if not isinstance(item, dict):
            self.findings.refuse(at, "wrong_type", f"{at} is {shown(item)}; use an object with from and value.")
            return ""
        speaker, value = item.get("from"), item.get("value")
        role = formats.SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            hint = _speaker_of(speaker) or "one of human, gpt, system, function_call, observation"
            text = f"{at}.from is {shown(speaker)}; use {hint}."
            self.findings.refuse(f"{at}.from", "unknown_role", text)
            return ""
        if not isinstance(value, str):
            self.findings.refuse(f"{at}.value", "wrong_type", f"{at}.value is {shown(value)}; use text.")
            return ""
        if len(item) > 2:
            check_item_keys(item, role, name, at, self.findings)
        if role not in {"assistant", "function_call"} and (flag := asks_to_train(item)):
            text = f"{at}.{flag} asks to train a {role} message; only the assistant's are trained, remove it."
            self.findings.refuse(f"{at}.{flag}", "invalid_weight", text)
        self.findings.characters += len(value)
        if role == "function_call":
            return self._sharegpt_call(item, at)
        if role == "assistant":
            self.by_tag = self.by_tag or "<tool_call>" in value
            self._assistant({"content": value, "weight": weight_of(item)}, len(value), at)
        elif role == "tool":
            self._legacy_answer(item, at)
        return role

    def _sharegpt_call(self, item: Row, at: str) -> str:
        calls = calls_in(item["value"])
        if calls is None:
            slip = "a Python literal, " if is_python(item["value"]) else ""
            text = (
                f"{at}.value is {slip}{shown(item['value'])}; use JSON text with name and arguments, or a list of such."
            )
            self.findings.refuse(f"{at}.value", "invalid_arguments", text)
            return ""
        functions = [{"name": call["name"], "arguments": formats.arguments_text(call["arguments"])} for call in calls]
        self._assistant({"function_call": functions, "weight": weight_of(item)}, 0, at)
        return "assistant"

    def _check_order(self, roles: list[str], at: str) -> None:
        refuse, warn = self.findings.refuse, self.findings.warn
        self.findings.trained_characters += self.trainable if self.trained else 0
        if self.trained and not self.trainable:
            remedy = "give one assistant message text or tool_calls, and no weight 0"
            refuse(at, "no_trainable_tokens", f"{at} has no assistant message to train on; {remedy}.")
        elif self.trained and self.empty:
            for place in self.empty:
                text = f"{place} is trained and empty; give it text or tool_calls, or weight 0."
                refuse(place, "empty_assistant_message", text)
        elif self.trained and roles[-1] != "assistant":
            refuse(
                f"{at}[{len(roles) - 1}].role",
                "last_message_not_assistant",
                f"{at} ends with {roles[-1]}; end with the assistant's answer.",
            )
        elif not self.trained and roles[-1] == "assistant" and at.endswith("messages"):
            warn(
                f"{at}[{len(roles) - 1}].role", "prompt_ends_with_assistant", "A prompt ends with an assistant message."
            )
        if any(role in {"system", "developer"} for role in roles[1:]):
            warn(at, "system_not_first", "A system message is not the first message; some chat templates refuse that.")
        if any(a == b != "tool" for a, b in itertools.pairwise(roles)):
            warn(at, "same_role_twice", "Two messages in a row have the same role; some chat templates refuse that.")


def _speaker_of(speaker: Any) -> str | None:
    """What a speaker in capitals, or as another tool names it, is in ShareGPT."""
    role = _ROLE_OF.get(speaker.strip().casefold()) if isinstance(speaker, str) else None
    name = {"user": "human", "assistant": "gpt", "tool": "observation"}.get(role or "", role)
    return name and f'"{name}"'


def refuse_unknown_keys(value: Row, allowed: frozenset[str], at: str, findings: RowFindings) -> None:
    for key in sorted(key for key in value.keys() - allowed if value[key] is not None):
        name = f"{at}.{key[:80]}" if at else key[:80]
        near = [REASONING] if key in LIKE_REASONING else difflib.get_close_matches(key[:80], allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        findings.refuse(name, "unknown_key", f"{name} is not a known key; {hint}allowed: {', '.join(sorted(allowed))}.")


def listed_tools(tools: Any, at: str, findings: RowFindings) -> frozenset[str] | None:
    """Names of the tools a row lists, or None where it lists none."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        findings.refuse(at, "wrong_type", f"{at} is {shown(tools)}{_slip(tools, 'use a list of tools')}.")
        return None
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            remedy = _slip(tool, 'use {"type": "function", "function": {…}}')
            text = f"{at}[{index}] is {shown(tool)}{remedy}."
            findings.refuse(f"{at}[{index}]", "wrong_type", text)
            continue
        if too_deep({**tool, "function": None}):
            findings.refuse(f"{at}[{index}]", "wrong_type", f"{at}[{index}] nests too deeply; keep to a few levels.")
        names |= listed_functions([tool.get("function")], f"{at}[{index}].function", findings, single=True)
    return frozenset(names)


def _slip(value: Any, remedy: str) -> str:
    """The end of a sentence: the slip that a text in place of a list or an object is, or else the remedy."""
    slip = slip_of(value)
    return f", {slip}" if slip else f"; {remedy}"


def listed_functions(functions: Any, at: str, findings: RowFindings, *, single: bool = False) -> frozenset[str]:
    if not isinstance(functions, list):
        findings.refuse(at, "wrong_type", f"{at} is {shown(functions)}; use a list of functions.")
        return frozenset()
    names: set[str] = set()
    for index, function in enumerate(functions):
        name = at if single else f"{at}[{index}]"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            findings.refuse(name, "wrong_type", f"{name} is {shown(function)}; use an object with name and parameters.")
        elif not isinstance(function.get("parameters"), dict | None) or too_deep(function):
            findings.refuse(
                f"{name}.parameters", "wrong_type", f"{name}.parameters must be a JSON schema object of few levels."
            )
        else:
            names.add(function["name"])
    return frozenset(names)
