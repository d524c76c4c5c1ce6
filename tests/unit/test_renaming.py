"""Rows whose columns have other names than ours: `training.columns`, by one code for check and trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from shared.contract.spec import ColumnName
from shared.rows import formats
from shared.rows.cells import csv_lines
from shared.rows.check import DatasetReport, check, read_report
from shared.rows.convert import checked_lines

TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
ITEMS = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


def lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(content: bytes, columns: Mapping[str, str], *, cells: bool = False) -> tuple[DatasetReport, list[Any]]:
    """What the check says of the rows, and what the trainer gets."""
    report = check([content], columns=columns, cells=cells, made_of="line" if cells else None)
    staged = list(checked_lines([content], columns=columns, cells=cells)) if report.ok else []
    return report, [json.loads(row) for row in staged]


def test_the_names_that_a_job_may_map_are_those_that_rows_are_read_by() -> None:
    assert set(get_args(ColumnName)) == set[str]().union(*formats.KEYS.values())


# our names, a row under them, and what is trained
SHAPES = [
    ({"messages": TALK}, {"messages": TALK}),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    ({"text": "a"}, {"text": "a"}),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {
            "messages": [{"role": "user", "content": "a"}],
            "chosen": {"role": "assistant", "content": "b"},
            "rejected": {"role": "assistant", "content": "c"},
        },
    ),
    (
        {"input": {"messages": TALK[:1]}, "preferred_completion": TALK[1:], "non_preferred_completion": ANSWER}
        if (ANSWER := [{"role": "assistant", "content": "c"}])
        else {},
        {"messages": TALK[:1], "chosen": TALK[1], "rejected": ANSWER[0]},
    ),
    (
        {"prompt": "a", "completion": "b", "label": True},
        {
            "messages": [{"role": "user", "content": "a"}],
            "completion": {"role": "assistant", "content": "b"},
            "label": True,
        },
    ),
    ({"prompt": TALK[:1], "completion": TALK[1:]}, {"messages": TALK}),
    (
        {"conversations": ITEMS, "system": "s"},
        {"messages": [{"role": "system", "content": "s"}, *TALK]},
    ),
    ({"instruction": "a?", "output": "b", "input": ""}, {"messages": TALK}),
]


@pytest.mark.parametrize(("row", "trained"), SHAPES)
def test_every_shape_may_have_other_names(row: dict[str, Any], trained: dict[str, Any]) -> None:
    columns = {name: f"spalte {name}!" for name in row}
    report, staged = read(lines(*({columns[name]: value for name, value in row.items()} for _ in range(3))), columns)

    assert (report.ok, report.problems, staged) == (True, (), [trained] * 3)
    (warning,) = (one for one in report.warnings if one.code == "renamed_columns")
    assert warning.rows == 3
    assert all(f"{column} as {name}" in warning.message for name, column in columns.items())


def test_cells_of_a_csv_file_are_read_as_those_under_our_own_names() -> None:
    columns = {"prompt": "frage", "completion": "antwort", "label": "gut"}
    made = b"".join(csv_lines([b"frage,antwort,gut,nr\na,b,true,1\n,c,0,2\n"], others=True))
    report, _ = read(made, columns, cells=True)

    assert [problem.message for problem in report.problems] == ["frage is empty; write some text."]
    made = b"".join(csv_lines([b"frage,antwort,gut,nr\na,b,true,1\nd,c,0,2\n"], others=True))
    _, staged = read(made, columns, cells=True)
    assert [(row["messages"][0]["content"], row["label"]) for row in staged] == [("a", True), ("d", False)]
    talk = json.dumps(TALK).replace('"', '""')
    made = b"".join(csv_lines([f'dialog,nr\n"{talk}",1\n'.encode()], others=True))
    assert read(made, {"messages": "dialog"}, cells=True)[1] == [{"messages": TALK}]


def test_an_empty_prompt_of_a_csv_file_is_an_empty_text_under_any_name() -> None:
    made = b"".join(csv_lines([b"frage,antwort\n,b\n"], others=True))

    assert read(made, {"prompt": "frage", "completion": "antwort"}, cells=True)[1] == [
        {"prompt": "", "completion": "b"}
    ]


def test_names_may_be_swapped() -> None:
    _, staged = read(lines({"prompt": "b", "completion": "a"}), {"prompt": "completion", "completion": "prompt"})

    assert staged == [{"prompt": "a", "completion": "b"}]


def test_other_columns_are_dropped_and_told_as_ever() -> None:
    report, _ = read(lines({"q": "a", "a": "b", "source": "x"}), {"prompt": "q", "completion": "a"})

    assert report.dropped_columns == ("source",)


GOOD = {"q": "a", "a": "b"}
QA = {"prompt": "q", "completion": "a"}
# name, rows, columns, line, code, words
REFUSED: list[tuple[str, list[dict[str, Any]], dict[str, str], int, str, str]] = [
    ("unknown", [GOOD] * 3, {"prompt": "qq", "completion": "a"}, 1, "unknown_column",
     "training.columns reads qq as prompt, but no row has it; did you mean q? the first has: a, q."),
    ("unknown and optional", [{**GOOD, "s": "x"}], {**QA, "system": "sys"}, 1, "unknown_column", "sys as system"),
    ("missing", [GOOD, {"q": "a"}, {"q": "c"}, GOOD], QA, 2, "missing_column",
     "The row has no a, which training.columns reads as completion (2 rows)"),
    ("null", [GOOD, {"q": None, "a": "b"}], QA, 2, "missing_column", "The row has no q"),
    ("two to one", [GOOD, {**GOOD, "prompt": "x"}], QA, 2, "two_columns",
     "The row has prompt too, beside q, which training.columns reads as prompt"),
    ("an unknown row", [GOOD, {"x": 1}], QA, 2, "missing_column", "The row has no q"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "columns", "line", "code", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_read_is_refused_once_with_its_count(
    rows: list[dict[str, Any]], columns: dict[str, str], line: int, code: str, words: str
) -> None:
    report, _ = read(lines(*rows), columns)

    told = [problem for problem in report.problems if problem.code == code]
    assert [(one.line, one.column) for one in told] == [(line, 1)]
    assert words in told[0].message
    assert report.problem_count == 1


def test_faults_name_the_columns_of_the_file() -> None:
    content = lines({"dialog": [{"role": "bot", "content": "x"}]}, {"dialog": 3})
    report, _ = read(content, {"messages": "dialog"})

    assert [(one.param, one.column) for one in report.problems] == [("dialog[0].role", 14), ("dialog", 2)]
    assert "dialog[0].role is" in report.problems[0].message
    assert "messages" not in report.problems[1].message.split(";")[0]


def test_a_report_keeps_what_another_reading_of_the_rows_needs() -> None:
    report = check([b'{"x": "a"}\n'], made_of="row", left=["vector"], cells=True)
    again = read_report(json.loads(json.dumps(report.document())))

    assert (again.made_of, again.left, again.cells) == ("row", ("vector",), True)
    mapped = check([b'{"x": "a"}\n'], made_of="row", left=again.left, columns={"text": "vector"})
    assert [(one.code, one.unit) for one in mapped.problems] == [("unknown_column", "row")]
    assert "it holds no text" in mapped.problems[0].message


def test_a_table_of_unknown_columns_is_refused_once() -> None:
    report = check([b'{"x": "a"}\n' * 50], made_of="row")

    assert [(one.code, one.line, one.unit) for one in report.problems] == [("unknown_format", 1, "row")]
    assert "training.columns" in report.problems[0].message
    assert report.problem_count == 1


# Rows whose refusal names `training.columns`.
TOLD = [
    {"Prompt": "Hi?", "Response": "Hello."},
    {"Instruction": "Hi?", "Response": "Hello."},
    {"Instruction": "Hi?", "Input": "Kindly.", "Output": "Hello."},
    {"Question": "Hi?", "Answer": "Hello."},
    {"Question": "Hi?", "Complex_CoT": "Greet.", "Response": "Hello."},
    {"Context": "Hi?", "Response": "Hello."},
    {"System": "Be brief.", "User": "Hi?", "Assistant": "Hello."},
    {"system": "Be brief.", "user": "Hi?", "assistant": "Hello."},
    {"Text": "Hello."},
    {"Messages": TALK},
    {"dialogue": TALK},
    {"input": TALK[:1], "ideal": "Hello."},
    {"input": "Hi?", "output": "Hello."},
    {"input": "Hi?", "expectedOutput": "Hello."},
    {"input": "Hi?", "reasoning_content": "Greet.", "content": "Hello."},
    {"text_input": "Hi?", "output": "Hello."},
    {"problem": "Hi?", "deepseek_reasoning": "Greet.", "deepseek_solution": "Hello.", "domain": "small talk"},
    {"question": "Hi?", "deepseek_thinking_trajectory": "Greet.", "deepseek_attempt": "Hello.", "solution": "x"},
    {"question": "Hi?", "solution": "Hello.", "answer": "Bye."},
    {"instruction": "Hi?", "response": "Hello.", "answer": "Bye."},
    {"prompt": "Hi?", "response": "Hello."},
    {"prompt": "Hi?", "response": "Hello.", "system": "Be brief."},
    {"prompt": "Hi?", "completion": "Hello.", "system": "Be brief."},
    {"prompt": "Hi?", "response": "Hello.", "history": [["a", "b"]]},
    {"prompt": "Hi?", "response": "Hello.", "reasoning": "Greet."},
    {"prompt": "Hi?", "completion": "Hello.", "desirable": True},
    {"prompt": "Hi?", "preferred": "Hello.", "non_preferred": "No."},
    {"question": "Hi?", "chosen_response": "Hello.", "rejected_response": "No."},
]


@pytest.mark.parametrize("row", TOLD, ids=", ".join)
def test_the_columns_that_a_refusal_names_are_those_that_the_row_is_read_by(row: dict[str, Any]) -> None:
    data = json.dumps(row).encode() + b"\n"
    (problem,) = check([data]).problems

    named = [json.loads(columns) for columns in re.findall(r"\{\"[^}]*\}", problem.message)]
    assert named
    for columns in named:
        report = check([data], columns=columns)
        assert report.ok, report.problems
        (line,) = checked_lines([data], columns=columns)
        for text in ("Hi?", "Hello.", "Be brief.", "Greet.", "Kindly."):
            assert (text in line.decode()) == (text in data.decode()), text
