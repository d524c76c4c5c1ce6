"""Promises about rows as other tools and public data sets write them: the meaning is kept, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.rows.check import DatasetReport, check
from shared.rows.convert import canonical_lines, checked_lines

U = {"role": "user", "content": "Who won?"}
A = {"role": "assistant", "content": "Nobody."}
TOOL = {"type": "function", "function": {"name": "land", "parameters": {"type": "object"}}}


def line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], DatasetReport]:
    """The canonical rows, which both roads to the trainer agree on, and the report."""
    data = b"".join(map(line, rows))
    report = check([data])
    assert report.ok, report.problems
    made = list(canonical_lines([data]))
    assert list(checked_lines([data])) == made
    return [json.loads(one) for one in made], report


def warned(report: DatasetReport) -> dict[str, int]:
    return {warning.code: warning.rows for warning in report.warnings if warning.code != "duplicate_rows"}


def refused(row: dict[str, Any]) -> tuple[str, str, str]:
    report = check([line(row)])
    assert report.problem_count == 1, report.problems
    assert report.problems[0].line == 1
    return report.problems[0].param, report.problems[0].code, report.problems[0].message


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "land", "arguments": arguments}}
    return {"messages": [U, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}


def arguments_of(row: dict[str, Any]) -> str:
    text: str = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    return text


@pytest.mark.parametrize("times", [2, 3])
def test_arguments_encoded_again_are_read_as_the_object_inside_and_counted(times: int) -> None:
    encoded = '{"where": "here"}'
    for _ in range(times - 1):
        encoded = json.dumps(encoded)

    rows, report = read(calling(encoded), calling('{"where": "there"}'), calling(encoded))

    assert [arguments_of(row) for row in rows] == ['{"where": "here"}', '{"where": "there"}', '{"where": "here"}']
    assert warned(report) == {"arguments_encoded_twice": 2}


def test_the_old_function_call_and_sharegpt_have_their_arguments_read_too() -> None:
    twice = json.dumps('{"a": 1}')
    old = {"messages": [U, {"role": "assistant", "function_call": {"name": "land", "arguments": twice}}]}
    share = {
        "conversations": [
            {"from": "human", "value": "Who won?"},
            {"from": "function_call", "value": json.dumps({"name": "land", "arguments": twice})},
        ]
    }

    assert arguments_of(read(old)[0][0]) == '{"a": 1}'
    assert arguments_of(read(share)[0][0]) == '{"a": 1}'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('"land"', "json.dumps"),
        ("[1]", "json.dumps"),
        ("{'up': True}", "Python literal"),
        ('{"up": True}', "Python literal"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "NaN"),
        (json.dumps('{"a": 1e999}'), "out of range"),
        ({"a": 1}, "json.dumps"),
    ],
)
def test_arguments_that_are_no_object_stay_refused_with_their_reason(arguments: Any, words: str) -> None:
    param, code, message = refused(calling(arguments))

    assert (param, code) == ("messages[1].tool_calls[0].function.arguments", "invalid_arguments")
    assert words in message


@pytest.mark.parametrize("number", [2**53 + 1, 1460323737035677698, 2**64 + 1, -(10**40)])
def test_long_integers_in_arguments_and_schemas_are_kept_digit_for_digit(number: int) -> None:
    row = calling(json.dumps({"post": number}))
    row["tools"] = [{"type": "function", "function": {"name": "land", "parameters": {"const": number}}}]

    (made,), _ = read(row)

    assert json.loads(arguments_of(made)) == {"post": number}
    assert made["tools"][0]["function"]["parameters"] == {"const": number}


def test_an_empty_prompt_leaves_the_whole_completion_to_train() -> None:
    (made,), report = read({"prompt": "", "completion": " In our voice."})

    assert made == {"prompt": "", "completion": " In our voice."}
    assert (report.trained_characters, warned(report)) == (14, {})


def test_an_alpaca_row_may_ask_in_its_input_alone() -> None:
    (made,), _ = read({"instruction": "", "input": "Who won?", "output": "Nobody."})

    assert made == {"messages": [U, A]}
    assert refused({"instruction": "", "input": " ", "output": "x"})[:2] == ("instruction", "empty_text")


def test_an_empty_answer_passes_where_it_is_not_trained_and_is_named_where_it_is() -> None:
    empty = {"role": "assistant", "content": ""}

    read({"messages": [U, {**empty, "weight": 0}, U, A]})

    assert refused({"prompt": "", "completion": ""})[:2] == ("completion", "empty_text")
    assert refused({"messages": [U, empty]})[1] == "no_trainable_tokens"
