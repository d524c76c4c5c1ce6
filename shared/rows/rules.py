"""The rules a training row must keep, one function per shape; each fault names field, value and remedy.

Shapes and canonical rows are in `shared.rows.formats`; here lives only what is refused or warned about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shared.rows import columns, formats, strict_json
from shared.rows.conversation import Conversation, listed_functions, listed_tools, refuse_unknown_keys
from shared.rows.findings import RowFindings, shown
from shared.rows.loss_flags import REASONING
from shared.rows.shapes import Row, Shape
from shared.rows.slips import is_python

# Columns that may be the completion of a prompt: read as text, or as an answer to a question?
_ANSWERS = ("response", "answer", "output", "target", "chosen")


def check_row(row: Row, shape: Shape) -> RowFindings:
    """Check one parsed row against the rules of its shape. Never raises; a row without problems can be normalised."""
    findings = RowFindings()
    if not row.keys() <= formats.KEYS[shape]:
        columns.judge(row, shape, findings)
    _CHECKS[shape](row, findings)
    return findings


def _chat(row: Row, findings: RowFindings) -> None:
    names = listed_tools(row.get("tools"), "tools", findings)
    if row.get("functions") and row.get("tools") and not _are_the_same(row["functions"], row["tools"]):
        text = "functions and tools stand side by side, and one of them would not be read; keep tools."
        findings.refuse("functions", "unknown_key", text)
    elif row.get("functions") and not row.get("tools"):
        names = listed_functions(row["functions"], "functions", findings)
    if "parallel_tool_calls" in row and not isinstance(row["parallel_tool_calls"], bool | None):
        findings.refuse("parallel_tool_calls", "wrong_type", "parallel_tool_calls must be true or false.")
    _system(row, findings)
    Conversation(findings, tool_names=names).check(row.get("messages"), "messages")
    _say_where_the_answer_is(row, findings)


def _are_the_same(functions: Any, tools: Any) -> bool:
    """Whether a request names its functions twice, in the old form and in the new one."""
    return isinstance(tools, list) and functions == [tool.get("function") for tool in tools if isinstance(tool, dict)]


def _say_where_the_answer_is(row: Row, findings: RowFindings) -> None:
    """A conversation without its answer, which a column beside it holds: that is the remedy."""
    column = next((key for key in (*_ANSWERS, "completion") if isinstance(row.get(key), str)), None)
    if isinstance(row.get("choices"), list):
        column = "the one of choices that is whole (finish_reason stop or tool_calls)"
    for place, fault in enumerate(findings.problems if column else ()):
        if fault.code in {"no_trainable_tokens", "last_message_not_assistant"}:
            text = f"{fault.message.rstrip('.')}, or write {column} as its last message, of role assistant."
            findings.problems[place] = fault._replace(message=text)


def _prompt_completion(row: Row, findings: RowFindings) -> None:
    # OpenAI and Azure tell users to leave the prompt empty for open-ended text: the whole completion is trained.
    findings.characters += _text(row, "prompt", findings, may_be_empty=True)
    answer = next((key for key in _ANSWERS if isinstance(row.get(key), str)), None)
    if "completion" not in row and answer is not None:
        if any(row.get(key) for key in columns.OF_CHATS):
            return  # it is told there that the row is a chat, with its answer
        remedy = (
            f'to read {answer} as it, set training.columns to {{"completion": "{answer}"}} (text without a chat'
            f' template) or {{"instruction": "prompt", "output": "{answer}"}} (a chat)'
        )
        findings.refuse("completion", "wrong_type", f"completion is missing; {remedy}.")
        return
    trained = _text(row, "completion", findings)
    findings.characters += trained
    findings.trained_characters += trained


def _text_row(row: Row, findings: RowFindings) -> None:
    findings.characters = findings.trained_characters = _text(row, "text", findings)


def _openai_preference(row: Row, findings: RowFindings) -> None:
    asked = row.get("input")
    if not isinstance(asked, dict):
        findings.refuse("input", "wrong_type", f'input is {shown(asked)}; use an object such as {{"messages": […]}}.')
        return
    refuse_unknown_keys(asked, frozenset({"messages", "tools", "parallel_tool_calls"}), "input", findings)
    names = listed_tools(asked.get("tools"), "input.tools", findings)
    Conversation(findings, tool_names=names, trained=False).check(asked.get("messages"), "input.messages")
    for side in ("preferred_completion", "non_preferred_completion"):
        _completion(row.get(side), side, findings, tool_names=names)
    if not findings.problems:
        pair = formats.normalise(row, "openai_preference")
        _refuse_equal(pair["chosen"], pair["rejected"], "non_preferred_completion", findings)


def _chosen_rejected(row: Row, findings: RowFindings) -> None:
    names = _sharegpt_tools(row, findings)
    _system(row, findings)
    key = next((key for key in ("prompt", "messages", "conversations") if row.get(key) is not None), None)
    if key:
        _words(row[key], key, findings, tool_names=names)
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            findings.refuse(side, "wrong_type", f"{side} is missing; a pair has both answers, chosen and rejected.")
        else:
            _words(row[side], side, findings, tool_names=names)
    if findings.problems:
        return
    asked, chosen, rejected = formats.preference_pair(row)
    if not asked:
        findings.refuse(
            "prompt", "missing_prompt", "The row has no prompt; add prompt (text or messages) before chosen."
        )
    elif len(chosen) != 1 or len(rejected) != 1:
        findings.refuse(
            "rejected",
            "different_prompts",
            "chosen and rejected must answer the same messages; only the last may differ.",
        )
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        _refuse_untrainable(completion[-1:], side, findings)
    _refuse_equal(chosen, rejected, "rejected", findings)


def _kto(row: Row, findings: RowFindings) -> None:
    key = "messages" if row.get("messages") is not None else "prompt"
    if row.get("messages") is not None and row.get("prompt") is not None:
        findings.refuse("prompt", "unknown_key", "prompt and messages stand side by side; keep one.")
    names = _sharegpt_tools(row, findings)
    _system(row, findings)
    _words(row.get(key), key, findings, tool_names=names)
    completion = row.get("completion")
    if isinstance(completion, str):
        findings.trained_characters += _text(row, "completion", findings)
        findings.characters += len(completion)
    else:
        _completion(completion, "completion", findings, tool_names=names)
    if not isinstance(row.get("label"), bool):
        findings.refuse("label", "wrong_type", f"label is {shown(row.get('label'))}; use true (good) or false (bad).")


def _conversational(row: Row, findings: RowFindings) -> None:
    names = listed_tools(row.get("tools"), "tools", findings)
    if row.get("prompt") in ("", []):
        pass  # nothing is asked: the whole completion is trained, as where both are text
    elif isinstance(row.get("prompt"), str):
        findings.characters += _text(row, "prompt", findings)
    else:
        Conversation(findings, tool_names=names, trained=False).check(row.get("prompt"), "prompt")
    if isinstance(row.get("completion"), str):
        trained = _text(row, "completion", findings)
        findings.characters += trained
        findings.trained_characters += trained
    else:
        Conversation(findings, tool_names=names).check(row.get("completion"), "completion")


def _sharegpt(row: Row, findings: RowFindings) -> None:
    _system(row, findings)
    names = _sharegpt_tools(row, findings)
    Conversation(findings, tool_names=names).check(row.get("conversations"), "conversations")


def _system(row: Row, findings: RowFindings) -> None:
    system = row.get("system")
    if isinstance(system, str):
        findings.characters += len(system)
    elif system is not None:
        findings.refuse("system", "wrong_type", f"system is {shown(system)}; use text.")


def _alpaca(row: Row, findings: RowFindings) -> None:
    _sharegpt_tools(row, findings)
    for key in ("input", "system"):
        if not isinstance(row.get(key), str | None):
            findings.refuse(key, "wrong_type", f"{key} is {shown(row[key])}; use text.")
    asked = row.get("input")
    findings.characters += _text(
        row, "instruction", findings, may_be_empty=isinstance(asked, str) and bool(asked.strip())
    )
    answer = next((key for key in ("response", "generation", "answer") if isinstance(row.get(key), str)), None)
    if "output" not in row and answer is not None:
        remedy = f'to read {answer} as it, set training.columns to {{"output": "{answer}"}}'
        findings.refuse("output", "wrong_type", f"output is missing; {remedy}.")
        return
    if not isinstance(row.get(REASONING), str | None):
        text = f"{REASONING} is {shown(row[REASONING])}; use text."
        findings.refuse(REASONING, "wrong_type", text)
    trained = _text(row, "output", findings)
    findings.characters += trained
    findings.trained_characters += trained
    findings.messages += 2
    history = row.get("history")
    if history is not None and not (isinstance(history, list) and all(map(_is_turn, history))):
        findings.refuse("history", "wrong_type", "history must be a list of [question, answer] pairs of text.")
        return
    for index, (_, answer) in enumerate(history or ()):
        if not answer.strip():
            text = f"history[{index}][1] is trained and empty; write the answer, or remove the pair."
            findings.refuse(f"history[{index}][1]", "empty_text", text)


_CHECKS: dict[Shape, Callable[[Row, RowFindings], None]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text_row,
    "openai_preference": _openai_preference,
    "chosen_rejected": _chosen_rejected,
    "kto": _kto,
    "conversational": _conversational,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _completion(value: Any, at: str, findings: RowFindings, *, tool_names: frozenset[str] | None = None) -> None:
    """Exactly one assistant message, alone or as a list of one."""
    messages = value if isinstance(value, list) else [value]
    if (
        len(messages) != 1
        or not isinstance(messages[0], dict)
        or messages[0].get("role", messages[0].get("from")) is None
    ):
        findings.refuse(
            at, "wrong_completion", f"{at} is {shown(value)}; use a list with exactly one assistant message."
        )
        return
    _words(messages, at, findings, tool_names=tool_names)
    if not findings.problems:
        _refuse_untrainable(formats.normal_messages(messages), at, findings)


def _words(value: Any, at: str, findings: RowFindings, *, tool_names: frozenset[str] | None = None) -> None:
    """A prompt or a completion: text, one message, or several."""
    if isinstance(value, str):
        findings.characters += len(value)
        if not value.strip():
            findings.refuse(at, "empty_text", f"{at} is empty; write some text.")
        return
    messages = [value] if isinstance(value, dict) else value
    Conversation(findings, tool_names=tool_names, trained=False).check(messages, at)


def _refuse_untrainable(messages: Iterable[Row], at: str, findings: RowFindings) -> None:
    for message in messages:
        if message["role"] != "assistant":
            findings.refuse(at, "wrong_completion", f"{at} is a {message['role']} message; use an assistant message.")
        elif message.get("weight") == 0:
            findings.refuse(
                at, "invalid_weight", f"{at} has weight 0, but an answer of such a row is trained; remove it."
            )
        elif not message["content"].strip() and not message.get("tool_calls"):
            findings.refuse(at, "no_trainable_tokens", f"{at} is empty; give the assistant message text or tool_calls.")
        else:
            findings.trained_characters += len(message["content"])


def _refuse_equal(chosen: Any, rejected: Any, at: str, findings: RowFindings) -> None:
    if chosen == rejected:
        findings.refuse(
            at, "identical_completions", f"{at} equals the preferred answer; a pair must differ, drop or mend it."
        )


def _text(row: Row, key: str, findings: RowFindings, *, may_be_empty: bool = False) -> int:
    value = row.get(key)
    if not isinstance(value, str):
        findings.refuse(key, "wrong_type", f"{key} is {shown(value) if key in row else 'missing'}; use text.")
        return 0
    if not value.strip() and not may_be_empty:
        findings.refuse(key, "empty_text", f"{key} is empty; write some text or remove the row.")
    return len(value)


def _sharegpt_tools(row: Row, findings: RowFindings) -> frozenset[str] | None:
    tools = row.get("tools") or []
    listed = _parsed(tools) if isinstance(tools, str) else tools
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        slip = ", a Python literal; write JSON (json.dumps)" if isinstance(tools, str) and is_python(tools) else ""
        remedy = slip or "; use a list of tools or the JSON text of one"
        findings.refuse("tools", "wrong_type", f"tools is {shown(tools)}{remedy}.")
        return None
    return listed_tools(formats.sharegpt_tools(listed), "tools", findings)


def _parsed(text: str) -> Any:
    try:
        return strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
