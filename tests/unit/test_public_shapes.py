"""Rows of every public shape come out alike of every kind of file; old forms of calls are read; empties are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.rows.check import DatasetReport, check
from shared.rows.convert import canonical_lines, checked_lines
from tests.unit.test_file_kinds import KINDS, made
from tests.unit.test_foreign_rows import FOREIGN

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Yes?"}


def read(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], DatasetReport]:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    report = check([data])
    assert report.ok, report.problems
    lines = list(canonical_lines([data]))
    assert list(checked_lines([data])) == lines
    return [json.loads(line) for line in lines], report


def refused(row: dict[str, Any]) -> tuple[str, str, str]:
    (problem,) = check([json.dumps(row).encode()]).problems
    return problem.param, problem.code, problem.message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz", "rows.parquet", "rows.arrow"])
def test_every_public_shape_loads_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    for form, row, wanted in FOREIGN:
        lines, columns = made(tmp_path, name, KINDS[name]([row, row]))
        report = check([lines], made_of=columns.unit, left=columns.dropped)

        assert report.ok, (form, report.problems)
        assert [json.loads(line) for line in canonical_lines([lines])] == [wanted, wanted]
        assert {one.code for one in report.warnings if one.code.startswith("converted_")} == (
            {f"converted_{form}"} if form else set()
        )


FLAT = [shape for shape in FOREIGN if all(isinstance(value, str | bool) for value in shape[1].values())]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.zst"])
def test_shapes_of_text_columns_load_from_delimited_files(tmp_path: Path, name: str) -> None:
    assert len(FLAT) >= 5
    for _, row, wanted in FLAT:
        lines, _ = made(tmp_path, name, KINDS[name]([row]))

        assert [json.loads(line) for line in canonical_lines([lines])] == [wanted]


CALLS = [{"name": "a", "arguments": '{"x": 1}'}, {"name": "b", "arguments": "{}"}]


def test_parallel_calls_in_the_old_form_are_read_with_their_answers_in_order() -> None:
    answers = [{"role": "function", "name": call["name"], "content": call["name"]} for call in CALLS]
    (row,), _ = read({"messages": [U, {"role": "assistant", "function_call": CALLS}, *answers, A]})

    calls = row["messages"][1]["tool_calls"]
    assert [call["function"] for call in calls] == CALLS
    assert [answer["tool_call_id"] for answer in row["messages"][2:4]] == [call["id"] for call in calls]
    assert len({call["id"] for call in calls}) == 2


def test_a_sharegpt_item_may_hold_a_list_of_calls() -> None:
    listed = json.dumps([{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}])
    talk = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": listed}]
    (row,), _ = read({"conversations": [*talk, *({"from": "observation", "value": n} for n in "ab"), ASKED]})

    assert [call["function"] for call in row["messages"][1]["tool_calls"]] == CALLS
    assert refused({"conversations": [talk[0], {"from": "function_call", "value": "[]"}]})[1] == "invalid_arguments"
    python = {"from": "function_call", "value": "{'name': 'a', 'arguments': {}}"}
    assert "Python literal" in refused({"conversations": [talk[0], python]})[2]


ASKED = {"from": "gpt", "value": "Yes?"}
TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
HERMES: dict[str, Any] = {
    "id": "7",
    "category": "weather",
    "tools": json.dumps([TOOL]),
    "conversations": [
        {"from": "system", "value": "You call functions."},
        {"from": "human", "value": "Hi"},
        {
            "from": "gpt",
            "value": 'I look.\n<tool_call>\n{"arguments": {"x": 12345678901234567890}, "name": "a"}\n</tool_call>\n'
            '<tool_call>\n{"arguments": {}, "name": "a"}\n</tool_call>\n',
        },
        {
            "from": "tool",
            "value": "<tool_response>\n{}\n</tool_response>\n<tool_response>\n[1]\n</tool_response>\n",
        },
        ASKED,
    ],
}


def test_hermes_calls_in_tags_are_read_as_calls_and_counted() -> None:
    (row,), report = read(HERMES)

    system, user, call, first, second, answer = row["messages"]
    assert (system["content"], user, answer, row["tools"]) == ("You call functions.", U, A, [TOOL])
    assert call["content"] == "I look."
    assert [one["function"]["arguments"] for one in call["tool_calls"]] == ['{"x": 12345678901234567890}', "{}"]
    assert [(one["content"], one["tool_call_id"]) for one in (first, second)] == [
        ("{}", call["tool_calls"][0]["id"]),
        ("[1]", call["tool_calls"][1]["id"]),
    ]
    assert {one.code for one in report.warnings} == {"converted_tagged_calls", "dropped_columns"}


def test_hermes_calls_in_messages_that_a_tool_answers_are_read_as_those_of_items() -> None:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": roles.get(item["from"], item["from"]), "content": item["value"]} for item in HERMES["conversations"]
    ]
    (row,), report = read({"messages": messages, "tools": [TOOL]})
    (items,), _ = read(HERMES)

    assert row == items
    (named,), _ = read({"messages": [*messages[:3], {**messages[3], "name": "a"}, *messages[4:]]})
    assert [answer["name"] for answer in named["messages"][3:5]] == ["a", "a"]
    assert {one.code for one in report.warnings} == {"converted_tagged_calls"}
    text = {"messages": [*messages[:2], {**messages[2], "content": "<tool_call>\n{}\n</tool_call>"}]}
    assert read(text)[0] == [text]  # nobody answers it: a text


def test_a_call_in_tags_that_is_a_python_literal_is_read_as_the_json_that_it_means() -> None:
    call = "{'name': 'a', 'arguments': {'on': True, 'note': \"it's\", 'id': 12345678901234567890}}"
    value = f"<tool_call>\n{call}\n</tool_call>"
    (row,), _ = read({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": value}]})

    (made,) = row["messages"][1]["tool_calls"]
    assert made["function"] == {"name": "a", "arguments": '{"on": true, "note": "it\'s", "id": 12345678901234567890}'}


@pytest.mark.parametrize(
    "value",
    [
        "<tool_call>\n{'name': 'a'}\n</tool_call>",
        "<tool_call>\n{'name': 'a', 'arguments': {1, 2}}\n</tool_call>",
        "<tool_call>\n{'name': 'a', 'arguments': {'x': __import__('os')}}\n</tool_call>",
        "<tool_call>\n{'name': 'a', 'arguments': {'x': '\\ud83d'}}\n</tool_call>",
        '<tool_call>{"name": "a", "arguments": {}}</tool_call> and more',
        "<tool_call>",
    ],
)
def test_tags_that_hold_no_call_leave_the_row_as_it_is(value: str) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": value}]

    assert read({"conversations": talk})[0][0]["messages"][1] == {"role": "assistant", "content": value}


def test_keys_of_sharegpt_items_that_nobody_reads_are_told_and_slips_are_refused() -> None:
    talk = [{"from": "human", "value": "Hi", "lang": "en"}, {**ASKED, "lang": "en", "score": 1, "note": None}]
    (row,), report = read({"conversations": talk})

    assert row == {"messages": [U, A]}
    assert report.dropped_columns == ("conversations[].lang", "conversations[].score")
    assert refused({"conversations": [talk[0], {**ASKED, "wieght": 0}]})[:2] == (
        "conversations[1].wieght",
        "unknown_key",
    )


@pytest.mark.parametrize(
    ("row", "param", "code"),
    [
        ({"messages": [U, {**A, "content": " "}, U, A]}, "messages[1]", "empty_assistant_message"),
        ({"conversations": [ASKED, {**ASKED, "value": ""}]}, "conversations[1]", "empty_assistant_message"),
        ({"instruction": "a", "output": "b", "history": [["Hi", ""]]}, "history[0][1]", "empty_text"),
        ({"instruction": "a", "output": ""}, "output", "empty_text"),
    ],
)
def test_an_empty_answer_that_would_be_trained_is_named(row: dict[str, Any], param: str, code: str) -> None:
    assert refused(row)[:2] == (param, code)


def test_an_empty_answer_that_is_not_trained_passes() -> None:
    empty = {"role": "assistant", "content": ""}

    read({"messages": [U, {**empty, "weight": 0}, U, A]})
    read({"prompt": [U, empty, U], "completion": [A]})


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.csv", "rows.json"])
def test_a_placeholder_beside_an_image_column_is_refused_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "<image>\nWhat?", "completion": "A bus.", "image": None}, {"prompt": "a", "completion": "b"}]
    lines, columns = made(tmp_path, name, KINDS[name](rows) if name != "rows.csv" else CSV)
    report = check([lines], made_of=columns.unit, left=columns.dropped)

    (problem,) = report.problems
    assert (problem.param, problem.code) == ("image", "unsupported_content")
    assert "placeholder" in problem.message


CSV = b"prompt,completion,image\n<image> What?,A bus.,\na,b,\n"
