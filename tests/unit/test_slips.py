"""Common slips are called by their names: once, with line, column or message, reason and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.rows.cells import RowRefused, csv_lines, table_lines
from shared.rows.check import Limits, check

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Yes?"}
GOOD = json.dumps({"messages": [U, A]})
LINES = [
    # id, the second line of a file, column, param, code, words of reason and remedy
    ("trailing comma in an object", '{"text": "a",}', 14, "", "invalid_json", "comma stands before the closing }"),
    ("trailing comma in a list", '{"messages": [1, ]}', 18, "", "invalid_json", "before the closing ]; remove it"),
    ("two commas", '{"a": 1,, "b": 2}', 9, "", "invalid_json", "Two commas"),
    (
        "smart quotes around a key",
        "{\u201ctext\u201d: 1}",
        2,
        "",
        "invalid_json",
        "typographic quotation mark (\u201c)",
    ),
    ("smart quotes around text", '{"text": \u201ca\u201d}', 10, "", "invalid_json", "around keys and text"),
    ("single quotes", "{'text': 'a'}", 2, "", "invalid_json", "Python literal"),
    ("True", '{"text": "a", "label": True}', 24, "", "invalid_json", "json.dumps"),
    ("None", '{"text": None}', 10, "", "invalid_json", "Python literal"),
    ("a byte order mark in the middle", "\ufeff" + GOOD, 1, "", "invalid_json", "where files were joined; remove it"),
    ("a key without quotes", '{text: "a"}', 2, "", "invalid_json", 'write "key"'),
    ("a fence", "```json", 1, "", "invalid_json", "fence of Markdown"),
    ("a no-break space", '{"text":\u00a0"a"}', 9, "", "invalid_json", "invisible character"),
    ("a comment", "// rows", 1, "", "invalid_json", "comment"),
    ("a row encoded twice", json.dumps(GOOD), 1, "", "not_an_object", "encoded twice; write the value itself"),
    (
        "messages encoded twice",
        json.dumps({"messages": json.dumps(json.dumps([U, A]))}),
        2,
        "messages",
        "wrong_type",
        "encoded twice",
    ),
    ("messages as Python text", json.dumps({"messages": str([U, A])}), 2, "messages", "wrong_type", "Python literal"),
    ("capitals", json.dumps({"Messages": [U, A]}), 1, "", "unknown_format", "capitals or spaces; write them small"),
    (
        "capitals of a question and its answer",
        json.dumps({"Question": "Hi?", "Complex_CoT": "Greet.", "Response": "Hello."}),
        *(1, "", "unknown_format"),
        '{"instruction": "Question", "output": "Response", "reasoning_content": "Complex_CoT"}',
    ),
    (
        "a result that nobody asked for",
        json.dumps({"messages": [U, {"role": "tool", "content": "21"}, A]}),
        *(len(json.dumps({"messages": [U]})) + 1, "messages[1].tool_call_id", "unknown_tool_call_id"),
        "is missing; there is no earlier tool call",
    ),
    ("an id as a float", '{"text": "a", "id": 1e999}', 21, "id", "number_out_of_range", "write it as a string"),
]


@pytest.mark.parametrize(
    ("line", "column", "param", "code", "words"), [s[1:] for s in LINES], ids=[s[0] for s in LINES]
)
def test_a_slip_in_a_line_is_called_by_its_name(line: str, column: int, param: str, code: str, words: str) -> None:
    report = check([f"{GOOD}\n{line}\n{GOOD}\n".encode()])

    (problem,) = report.problems
    assert (problem.line, problem.column, problem.param, problem.code) == (2, column, param, code)
    assert words in problem.message
    assert problem.message.count(".") <= 2


TABLES = [
    # id, the file, line, code, words
    (
        "semicolons",
        "prompt;completion\na;b\n",
        1,
        "invalid_csv",
        "semicolons stand between the columns; save it with commas",
    ),
    ("sep=", "sep=,\nprompt,completion\na,b\n", 1, "invalid_csv", "mark for Excel, and no header; remove the line"),
    ("sep=;", "SEP=;\nprompt;completion\n", 1, "invalid_csv", "mark for Excel"),
    ("capitals", "Prompt,Completion\na,b\n", 1, "unknown_format", "'Prompt' differs from prompt in capitals"),
    ("a comma too many", "prompt,completion\na,b,\n", 2, "wrong_cell_count", "quote cells that hold commas"),
]


@pytest.mark.parametrize(("text", "line", "code", "words"), [s[1:] for s in TABLES], ids=[s[0] for s in TABLES])
def test_a_slip_in_a_table_is_called_by_its_name(text: str, line: int, code: str, words: str) -> None:
    with pytest.raises(RowRefused, match=words) as refused:
        list(csv_lines([text.encode()]))

    assert (refused.value.line, refused.value.code) == (line, code)


REAL_FILES = [
    ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
    ("commas behind rows", b'{"text": "a"},\n', "A comma stands behind the object"),
    ("rows under a key", b'{"data": [{"text": "a"}, {"text": "b"}]}\n', "The rows lie in a list under data"),
    ("a spreadsheet", b"\xd0\xcf\x11\xe0\xa1\xb1", "Excel (.xls)"),
    ("a picture", b"\x89PNG\r\n\x1a\n", "a picture"),
    ("Avro", b"Obj\x01\x04", "Avro"),
    ("a list per line", b'[{"text": "a"}]\n', "The row is a list"),
    ("a conversation under another key", b'{"dialog": [{"role": "user", "content": "a"}]}\n', "training.columns"),
]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in REAL_FILES], ids=[case[0] for case in REAL_FILES])
def test_a_file_of_another_form_is_told_with_what_to_do(content: bytes, words: str) -> None:
    assert words in check([content]).problems[0].message


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"prompt|completion\na|b\n", "invalid_csv", "bars stand between"),
        (b"frage;antwort\na;b\n", "invalid_csv", "semicolons stand between"),
        (b"prompt,completion\ra,b\rc,d\r", "cr_line_endings", "carriage return"),
    ],
)
def test_other_marks_between_cells_and_rows_are_named(content: bytes, code: str, words: str) -> None:
    with pytest.raises(RowRefused, match=words) as refused:
        list(csv_lines([content], others=True))

    assert refused.value.code == code


def test_the_fields_that_a_table_gives_to_all_its_objects_are_not_trained() -> None:
    rows = [
        {"messages": [{"content": "a", "calls": [{"arguments": {"x": 1, "y": None}}]}]},
        {"messages": [{"content": "b", "calls": [{"arguments": {"x": None, "y": [None, {"z": None}]}}]}]},
    ]

    assert [json.loads(line) for line in table_lines(rows)] == [
        {"messages": [{"content": "a", "calls": [{"arguments": {"x": 1}}]}]},
        {"messages": [{"content": "b", "calls": [{"arguments": {"y": [None, {}]}}]}]},
    ]


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b", "label": 1}, {"instruction": "a", "output": "b", "kto_tag": 0}]
)
def test_a_label_of_one_or_zero_is_a_truth(row: dict) -> None:
    assert check([json.dumps(row).encode()]).format == "kto"


def test_an_empty_cell_is_an_empty_text_where_a_row_is_made_of_texts() -> None:
    lines = list(csv_lines([b"prompt,completion,system\n,b,\n", b'a,"",\n']))

    assert [json.loads(line) for line in lines] == [
        {"prompt": "", "completion": "b"},
        {"prompt": "a", "completion": ""},
    ]
    assert [str(problem) for problem in check(lines, made_of="line").problems] == [
        "line 3: completion is empty; write some text or remove the row."
    ]


def test_tabs_between_columns_are_read_as_commas_are() -> None:
    assert list(csv_lines([b"prompt\tcompletion\na, b\tc\n"])) == [b'\n{"prompt": "a, b", "completion": "c"}\n']


@pytest.mark.parametrize(
    "cell", [json.dumps([U, A]), json.dumps(json.dumps([U, A])), str([U, A])], ids=["JSON", "JSON of JSON", "Python"]
)
def test_a_cell_of_messages_is_json_or_told_why_not(cell: str) -> None:
    quoted = cell.replace('"', '""')
    report = check(csv_lines([f'messages\n"{quoted}"\n'.encode()]), made_of="line")

    wanted = {json.dumps([U, A]): None, str([U, A]): "Python literal"}.get(cell, "encoded twice")
    assert [str(problem).split(" is ")[0] for problem in report.problems] == (["line 2: messages"] if wanted else [])
    assert all(str(wanted) in problem.message for problem in report.problems)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", [GOOD, "prompt,completion\na,b\n", f"[{GOOD}]"])
def test_another_encoding_is_named_in_every_text(encoding: str, text: str) -> None:
    (problem,) = check([text.encode(encoding)]).problems

    assert (problem.line, problem.code) == (1, "wrong_encoding")
    assert "save it as UTF-8" in problem.message


def test_an_indented_file_of_objects_is_named_once() -> None:
    (problem,) = check([json.dumps(json.loads(GOOD), indent=2).encode() + b"\n"]).problems

    assert (problem.line, problem.code) == (1, "invalid_json")
    assert "indented JSON" in problem.message


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64 + 1])
def test_integers_that_others_round_are_kept_in_cells_too(number: int) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"id": number})}}
    row = {"messages": [U, {"role": "assistant", "tool_calls": [call]}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"const": number}}}]
    cells = [json.dumps(value).replace('"', '""') for value in (row["messages"], tools)]

    (line,) = csv_lines(['messages,tools\n"{}","{}"\n'.format(*cells).encode()])

    assert json.loads(line) == {**row, "tools": tools}
    assert check([line]).ok


def test_reading_stops_after_very_many_problems_and_says_where() -> None:
    read: list[int] = []

    def chunks() -> Any:
        for number in range(100):
            read.append(number)
            yield b"{}\n" * 1000

    report = check(chunks(), limits=Limits(problems=2500))

    assert (report.problem_count, report.stopped_at, len(report.problems)) == (2500, 2500, 20)
    assert len(read) <= 4


def test_a_check_has_a_time_of_its_own_and_its_end_is_shown_first() -> None:
    ticks = iter(range(1000))
    report = check([b"{}\n" * 100], limits=Limits(seconds=50), clock=lambda: float(next(ticks)))

    assert (report.problems[0].line, report.problems[0].code) == (51, "too_slow")
    assert len(report.problems) == 20
