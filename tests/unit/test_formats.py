"""Promises of detection and normalisation: five canonical formats out of everything users bring."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.contract.completions import ChatTurn
from shared.rows import formats, shapes, strict_json
from shared.rows.cells import RowRefused, csv_lines
from shared.rows.convert import convert
from shared.rows.lines import FileRefused

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f"}}

CONVERSIONS = [
    # id, row, shape, canonical row
    (
        "developer becomes system, parts are joined, nulls go",
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                {**U, "name": None},
                {**A, "weight": 1.0},
            ]
        },
        "chat",
        {"messages": [{"role": "system", "content": "xy"}, U, {**A, "weight": 1}]},
    ),
    (
        "function_call becomes tool_calls",
        {
            "messages": [
                U,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "1"},
                A,
            ],
            "functions": [{"name": "f"}],
        },
        "chat",
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "1", "name": "f", "tool_call_id": "call_1"},
                A,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "prompt and completion stay",
        {"prompt": "q", "completion": "a"},
        "prompt_completion",
        {"prompt": "q", "completion": "a"},
    ),
    ("text stays", {"text": "t"}, "text", {"text": "t"}),
    (
        "OpenAI preference",
        {"input": {"messages": [U], "tools": [TOOL]}, "preferred_completion": [A], "non_preferred_completion": [B]},
        "openai_preference",
        {"messages": [U], "tools": [TOOL], "chosen": A, "rejected": B},
    ),
    (
        "preference in text",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "chosen_rejected",
        {"messages": [U], "chosen": A, "rejected": B},
    ),
    (
        "implicit prompt",
        {"chosen": [U, A], "rejected": [U, B]},
        "chosen_rejected",
        {"messages": [U], "chosen": A, "rejected": B},
    ),
    (
        "repeated prompt",
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]},
        "chosen_rejected",
        {"messages": [U], "chosen": A, "rejected": B},
    ),
    (
        "ShareGPT preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "chosen_rejected",
        {"messages": [U], "chosen": A, "rejected": B},
    ),
    (
        "kto",
        {"prompt": "q", "completion": "a", "label": True},
        "kto",
        {"messages": [U], "completion": A, "label": True},
    ),
    (
        "conversational prompt is not trained",
        {"prompt": [U, A, U], "completion": [B]},
        "conversational",
        {"messages": [U, {**A, "weight": 0}, U, B]},
    ),
    (
        "ShareGPT with tools",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": '[{"name": "f"}]',
            "id": 7,
        },
        "sharegpt",
        {
            "messages": [
                {"role": "system", "content": "s"},
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                    ],
                },
                {"role": "tool", "content": "1", "tool_call_id": "call_1"},
                A,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "Alpaca",
        {"instruction": "i", "input": "q", "output": "a", "history": [["q", "b"]], "text": "dropped"},
        "alpaca",
        {"messages": [U, B, {"role": "user", "content": "i\n\nq"}, A]},
    ),
]
IDS = [str(c[0]) for c in CONVERSIONS]


@pytest.mark.parametrize(("row", "shape", "canonical"), [c[1:] for c in CONVERSIONS], ids=IDS)
def test_each_shape_is_detected_and_becomes_canonical(
    row: shapes.Row, shape: shapes.Shape, canonical: shapes.Row
) -> None:
    before = json.dumps(row)

    assert shapes.detect(row) == shape
    assert formats.normalise(row, shape) == canonical
    assert json.dumps(row) == before


@pytest.mark.parametrize("canonical", [c[3] for c in CONVERSIONS], ids=IDS)
def test_normalising_a_canonical_row_gives_it_back(canonical: shapes.Row) -> None:
    assert formats.normalise(canonical, shapes.detect(canonical)) == canonical


TEXT = st.text(min_size=1, max_size=10)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=4,
)


@given(TURNS, TURNS, TEXT, TEXT)
def test_normalise_is_idempotent(
    prompt: list[formats.Message], completion: list[formats.Message], good: str, bad: str
) -> None:
    rows = [
        {"messages": prompt},
        {"prompt": prompt, "completion": completion},
        {"prompt": prompt, "chosen": good, "rejected": bad + "x"},
        {"prompt": good, "completion": bad, "label": False},
        {"instruction": good, "output": bad},
    ]
    for row in rows:
        once = formats.normalise(row, shapes.detect(row))
        assert formats.normalise(once, shapes.detect(once)) == once


def test_unknown_keys_are_named_with_the_formats_that_exist() -> None:
    with pytest.raises(shapes.UnknownShape, match=r"question.*use messages"):
        shapes.detect({"question": "x"})


def test_csv_becomes_canonical_rows() -> None:
    data = '\ufeffprompt,completion,label,id\r\n"a, ""b""\nc",d,TRUE,1\r\ne,f,0,2\r\n'.encode()
    chunks = [data[at : at + 3] for at in range(0, len(data), 3)]

    rows = [json.loads(line) for line in convert(chunks, source="csv")]

    assert [row["messages"][0]["content"] for row in rows] == ['a, "b"\nc', "e"]
    assert [row["label"] for row in rows] == [True, False]


def test_csv_cells_may_hold_messages_as_json() -> None:
    cell = json.dumps([U, A]).replace('"', '""')

    (line,) = convert([f'messages\n"{cell}"\n'.encode()], source="csv")

    assert json.loads(line) == {"messages": [U, A]}


BAD_CSV = [
    ("unknown header", b"frage,antwort\na,b\n", 1, "unknown_format", "known columns"),
    ("capitals", b"id,Prompt,Completion\n1,a,b\n", 1, "unknown_format", "'Prompt' differs from prompt in capitals"),
    ("column twice", b"text,text\na,b\n", 1, "unknown_format", "each once"),
    ("empty", b"", 1, "unknown_format", "known columns"),
    ("too many cells", b"prompt,completion\na,b,c\n", 2, "wrong_cell_count", "quote cells"),
    ("open quote", b'text\n"a\n', 2, "invalid_csv", "unexpected end of data"),
    ("quote bomb", b'text\n"' + b"a" * 200_000, 2, "invalid_csv", "field limit"),
    ("not UTF-8", b"text\n\xff\n", 2, "invalid_utf8", "save the file"),
]


@pytest.mark.parametrize(("data", "line", "code", "remedy"), [b[1:] for b in BAD_CSV], ids=[b[0] for b in BAD_CSV])
def test_bad_csv_is_named_with_its_line(data: bytes, line: int, code: str, remedy: str) -> None:
    with pytest.raises(RowRefused, match=remedy) as refused:
        list(csv_lines([data]))

    assert (refused.value.line, refused.value.code) == (line, code)


def test_conversion_stops_at_the_first_bad_row_with_its_line() -> None:
    good, bad = b'{"text": "a"}\n', b'{"text": ""}\n'
    stream = convert([good, bad], source="jsonl")

    assert next(stream) == b'{"text":"a"}\n'
    with pytest.raises(RowRefused, match="line 2: text is empty"):
        next(stream)


def test_conversion_refuses_another_kind_of_file() -> None:
    with pytest.raises(FileRefused, match="gzip"):
        list(convert([b"\x1f\x8b"], source="jsonl"))


def test_columns_are_found_by_path_or_by_the_nearest_parent() -> None:
    text = '{"a": [{"b": 1}, {"c": "\\"}"}], "d": 2}'

    found = strict_json.columns(text, ["a[1].c", "a[1].x.y", "d", "z"])

    assert {path: text[column - 1 :][:3] for path, column in found.items()} == {
        "a[1].c": '"c"',
        "a[1].x.y": '{"c',
        "d": '"d"',
        "z": '{"a',
    }


@given(st.text(max_size=60))
def test_the_walk_over_a_line_never_raises(text: str) -> None:
    list(strict_json.places(text))


@pytest.mark.parametrize(
    "message",
    [
        {**U, "name": "ann"},
        {"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {**A, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "21", "tool_call_id": "c", "name": "f"},
    ],
)
def test_a_message_of_a_question_reaches_the_template_as_that_of_a_row_does(message: dict[str, object]) -> None:
    assert [ChatTurn.model_validate(message).plain()] == formats.normal_messages([message])
