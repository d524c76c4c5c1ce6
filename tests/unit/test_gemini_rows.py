"""Gemini's and Vertex AI's rows and logs with calls: nothing of a request or of its answer is left out in silence."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from shared.rows.check import DatasetReport, check
from shared.rows.convert import checked_lines

JsonObject = dict[str, Any]
ASKED: Final[JsonObject] = {"role": "user", "parts": [{"text": "Warm?"}]}
CALL: Final[JsonObject] = {"functionCall": {"name": "weather", "args": {"city": "Rome"}}}
RESULT: Final[JsonObject] = {
    "role": "user",
    "parts": [{"functionResponse": {"name": "weather", "response": {"t": 21}}}],
}
SCHEMA: Final[JsonObject] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Final[JsonObject] = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
DECLARED: Final = {"functionDeclarations": [TOOL["function"]]}
SYSTEM: Final = {"systemInstruction": {"parts": [{"text": "Be brief."}]}}
QUESTION: Final = {"role": "user", "content": "Warm?"}
BRIEF: Final = {"role": "system", "content": "Be brief."}


def read(row: JsonObject) -> tuple[list[JsonObject], DatasetReport]:
    data = json.dumps(row).encode() + b"\n"
    report = check([data])
    return [json.loads(line) for line in checked_lines([data])] if report.ok else [], report


def logged(request: JsonObject, *parts: JsonObject, **candidate: Any) -> JsonObject:
    answer = {"content": {"role": "model", "parts": list(parts)}, **candidate}
    return {"request": request, "response": {"candidates": [answer]}}


def called(call_id: str, **more: Any) -> JsonObject:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", **more, "tool_calls": [call]}


def test_a_log_whose_answer_is_a_call_keeps_system_text_tools_and_arguments() -> None:
    (made,), report = read(logged({**SYSTEM, "contents": [ASKED], "tools": [DECLARED]}, CALL, finishReason="STOP"))

    assert made == {"messages": [BRIEF, QUESTION, called("call_1")], "tools": [TOOL]}
    assert "converted_logged" in {warning.code for warning in report.warnings}


def test_earlier_calls_of_a_log_are_kept_and_not_trained() -> None:
    earlier = {"contents": [ASKED, {"role": "model", "parts": [CALL]}, RESULT], "tools": [DECLARED]}
    (made,), _ = read(logged(earlier, {"text": "So.", "thought": True}, {"text": "Yes."}))

    assert made["messages"] == [
        QUESTION,
        called("call_1", weight=0),
        {"role": "tool", "content": '{"t": 21}', "name": "weather", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "So."},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"function_call": {"id": None, **CALL["functionCall"]}, "text": None, "inlineData": None},
        {**CALL, "thought": False},
        {**CALL, "thoughtSignature": "c2ln"},
    ],
    ids=["nulls", "no thought", "signature"],
)
def test_a_call_as_a_client_dumps_it_is_a_call(part: JsonObject) -> None:
    (made,), _ = read(logged({"contents": [ASKED], "tools": DECLARED}, part))

    assert made == {"messages": [QUESTION, called("call_1")], "tools": [TOOL]}


@pytest.mark.parametrize("key", ["parametersJsonSchema", "parameters_json_schema"])
def test_a_schema_of_a_declaration_stands_where_templates_read_it(key: str) -> None:
    declared = {"functionDeclarations": [{"name": "weather", key: SCHEMA}]}
    (made,), _ = read({"contents": [ASKED, {"role": "model", "parts": [CALL]}], "tools": [declared]})

    assert made["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (logged({"contents": [ASKED]}, {"text": "It is"}, finishReason="MAX_TOKENS"), "not cut at a limit"),
        (logged({"contents": [ASKED]}, {"text": "It is"}, finishReason="RECITATION"), "not cut at a limit"),
        (
            logged({"contents": [ASKED], "systemInstruction": {"parts": [{"inlineData": {}}]}}, {"text": "Yes."}),
            "of text and calls",
        ),
        (
            {
                "contents": [ASKED, {"role": "model", "parts": [{"text": "Yes."}]}],
                "systemInstruction": {"parts": [{"fileData": {}}]},
            },
            "systemInstruction is an object",
        ),
        (logged({"contents": [ASKED]}, {"inlineData": {"data": "x"}}), "inlineData"),
    ],
    ids=["cut", "held back", "system text of a log", "system text of a row", "picture"],
)
def test_what_is_no_conversation_of_text_and_calls_is_refused_by_name(row: JsonObject, words: str) -> None:
    _, report = read(row)

    assert report.problem_count == 1
    assert words in report.problems[0].message


LONG: Final = "3.14159265358979323846"
AS_TEXT: Final = f'{{"name": "f", "arguments": {{"x": {LONG}}}}}'
USER: Final = {"role": "user", "content": "Hi"}
HUMAN: Final = {"from": "human", "value": "Hi"}
TOOLS_AS_TEXT: Final = '[{"name": "f", "description": "d", "parameters": {}}]'


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [HUMAN, {"from": "function_call", "value": AS_TEXT}], "tools": TOOLS_AS_TEXT},
        {"conversations": [HUMAN, {"from": "gpt", "value": f"<tool_call>\n{AS_TEXT}\n</tool_call>"}], "tools": "[]"},
        {"messages": [USER, {"role": "tool_call", "content": AS_TEXT}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": f"[{AS_TEXT}]"}]},
        {"query": "Hi", "answers": f"[{AS_TEXT}]", "tools": TOOLS_AS_TEXT},
    ],
    ids=["item", "tag", "role", "list as text", "query and calls"],
)
def test_a_decimal_of_a_call_in_text_is_told_when_it_is_rounded(row: JsonObject) -> None:
    _, report = read(row)
    _, short = read(json.loads(json.dumps(row).replace(LONG, "3.14")))

    assert report.ok
    assert "rounded_decimal" in {warning.code for warning in report.warnings}
    assert "rounded_decimal" not in {warning.code for warning in short.warnings}


def test_a_decimal_of_a_result_or_of_a_tool_is_told_when_it_is_rounded() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": 7.5}}}]
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": {"x": 8.5}},
        {"role": "assistant", "content": "Yes."},
    ]
    row = json.dumps({"messages": messages, "tools": tools})

    for short in ("7.5", "8.5"):
        codes = {warning.code for warning in check([row.replace(short, LONG).encode()]).warnings}
        assert "rounded_decimal" in codes
    assert "rounded_decimal" not in {warning.code for warning in check([row.encode()]).warnings}


def test_an_exponent_beyond_all_bounds_ends_no_check() -> None:
    tiny = "1.23456789012345678e-99999999999999999999"
    text = f'{{"x": {tiny}}}'
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": text}}
    rows: list[JsonObject] = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [USER, {"role": "tool_call", "content": f'{{"name": "f", "arguments": {text}}}'}]},
    ]
    for row in rows:
        assert "rounded_decimal" in {warning.code for warning in read(row)[1].warnings}
