"""Conversations that are no list of objects with our keys are read as one, and counted; of every kind of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from shared.rows.check import check
from shared.rows.convert import canonical_lines, checked_lines
from tests.unit.test_file_kinds import KINDS, made

HI, HELLO = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
NO, THOUGHT = {**HELLO, "content": "No."}, {**HELLO, "reasoning_content": "Greet."}
AND, BYE = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}
TALK: Final = {"messages": [HI, HELLO, AND, BYE]}
TEXTS: Final = ["Hi?", "Hello.", "And?", "Bye."]
WHO: Final = ["human", "gpt", "human", "gpt"]
TOOL: Final = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL: Final = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CALLED: Final[dict[str, Any]] = {"messages": [HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
WITH_TOOL: Final = {"messages": [HI, HELLO], "tools": [TOOL]}
PAIR: Final = {"messages": [HI], "chosen": HELLO, "rejected": {**HELLO, "content": "No."}}


def items(speaker: str, words: str, who: list[str] = WHO) -> list[dict[str, str]]:
    return [{speaker: name, words: text} for name, text in zip(who, TEXTS, strict=True)]


SHAPES: Final[list[tuple[str, dict[str, Any], dict[str, Any]]]] = [
    ("columns_of_messages", {"conversations": {"from": WHO, "value": TEXTS}}, TALK),
    (
        "columns_of_messages",
        {"messages": {"content": TEXTS, "role": ["user", "assistant"] * 2, "name": [None] * 4}},
        TALK,
    ),
    ("texts_in_turn", {"conversations": TEXTS, "source": "lima"}, TALK),
    ("texts_in_turn", {"id": "7", "data": TEXTS}, TALK),
    ("json_text", {"messages": json.dumps(TALK["messages"])}, TALK),
    ("json_text", {"conversations": json.dumps(items("from", "value"))}, TALK),
    ("json_text", {"prompt": json.dumps([HI]), "completion": json.dumps([HELLO])}, {"messages": [HI, HELLO]}),
    ("json_text", {"prompt": "Hi?", "chosen": json.dumps([HELLO]), "rejected": json.dumps([NO])}, PAIR),
    ("json_text", {"prompt": json.dumps([HI]), "chosen": json.dumps([HI, HELLO]), "rejected": [HI, NO]}, PAIR),
    (
        "preferred_outputs",
        {
            "input": json.dumps({"messages": [HI]}),
            "preferred_output": json.dumps([HELLO]),
            "non_preferred_output": json.dumps([NO]),
        },
        PAIR,
    ),
    ("json_text", {"instruction": "Hi?", "output": "Hello.", "history": "[]"}, {"messages": [HI, HELLO]}),
    (
        "history_of_messages",
        {"instruction": "Hi?", "output": "Hello.", "history": [HI, HELLO]},
        {"messages": [HI, HELLO, HI, HELLO]},
    ),
    (
        "langchain_messages",
        {"messages": [{"type": "human", "content": "Hi?", "example": False}, {"type": "ai", "content": "Hello."}]},
        {"messages": [HI, HELLO]},
    ),
    (
        "langchain_messages",
        {
            "messages": [
                {"type": kind, "data": {"content": text}} for kind, text in (("human", "Hi?"), ("ai", "Hello."))
            ]
        },
        {"messages": [HI, HELLO]},
    ),
    (
        "langchain_messages",
        {
            "messages": [
                {"lc": 1, "type": "constructor", "id": ["schema", f"{kind}Message"], "kwargs": {"content": text}}
                for kind, text in (("Human", "Hi?"), ("AI", "Hello."))
            ]
        },
        {"messages": [HI, HELLO]},
    ),
    ("input_pair", {"system": "", "input": "Hi?", "chosen": "Hello.", "rejected": "No.", "rating": [9, 2]}, PAIR),
    ("input_pair", {"conversation": [HI], "chosen": HELLO, "rejected": NO}, PAIR),
    ("reasoned", {"question": "Hi?", "reasoning": "Greet.", "answer": "Hello."}, {"messages": [HI, THOUGHT]}),
    ("reasoned", {"instruction": "Hi?", "thinking": "Greet.", "output": "Hello."}, {"messages": [HI, THOUGHT]}),
    ("json_text", {"conversation": json.dumps([{"input": "Hi?", "output": "Hello."}])}, {"messages": [HI, HELLO]}),
    ("pairs_of_role_and_text", {"messages": [list(pair) for pair in zip(WHO, TEXTS, strict=True)]}, TALK),
    ("mixed_keys", {"conversations": items("from", "content")}, TALK),
    ("mixed_keys", {"conversations": items("from", "text")}, TALK),
    ("mixed_keys", {"messages": items("role", "value", ["user", "assistant"] * 2)}, TALK),
    ("conversation", {"conversation": items("from", "value")}, TALK),
    ("cohere_roles", {"messages": items("role", "content", ["User", "Chatbot"] * 2)}, TALK),
    ("null_question", {"prompt": None, "completion": "All of it."}, {"prompt": "", "completion": "All of it."}),
    ("null_question", {"instruction": None, "input": "Hi?", "output": "Hello."}, {"messages": [HI, HELLO]}),
    ("question", {"query": "Hi?", "response": "Hello.", "rejected_response": "No."}, PAIR),
    (
        "response_items",
        {
            "messages": [
                {"type": "message", **HI},
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "A clock."}]},
                *({"type": "function_call", "call_id": one, "name": "clock", "arguments": "{}"} for one in "cd"),
                *({"type": "function_call_output", "call_id": one, "output": one} for one in "dc"),
                {**HELLO, "type": "message", "id": "m", "status": "completed"},
            ]
        },
        {
            "messages": [
                HI,
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "A clock.",
                    "tool_calls": [CALL, {**CALL, "id": "d"}],
                },
                *({"role": "tool", "content": one, "tool_call_id": one} for one in "dc"),
                HELLO,
            ]
        },
    ),
    ("single_messages", {"prompt": HI, "completion": HELLO}, {"messages": [HI, HELLO]}),
    ("dolly", {"instruction": "Hi?", "answer": "Hello."}, {"messages": [HI, HELLO]}),
    ("listed_calls", {"messages": [HI, {"role": "assistant", "tool_calls": json.dumps([CALL])}]}, CALLED),
    ("listed_calls", {"messages": [HI, {"role": "assistant", "tool_calls": CALL}]}, CALLED),
    (
        "results_as_objects",
        {"messages": [*CALLED["messages"], {"role": "tool", "tool_call_id": "c", "content": {"t": 21}}, HELLO]},
        {"messages": [*CALLED["messages"], {"role": "tool", "content": '{"t": 21}', "tool_call_id": "c"}, HELLO]},
    ),
    ("tools", {**WITH_TOOL, "tools": [json.dumps(TOOL)]}, WITH_TOOL),
    ("tools", {**WITH_TOOL, "tools": TOOL}, WITH_TOOL),
    ("tools", {**WITH_TOOL, "tools": json.dumps(TOOL)}, WITH_TOOL),
    ("tools", {"instruction": "Hi?", "output": "Hello.", "tools": json.dumps([TOOL["function"]])}, WITH_TOOL),
]


@pytest.mark.parametrize(("form", "row", "wanted"), SHAPES)
def test_a_conversation_of_another_form_is_read_and_counted(
    form: str, row: dict[str, Any], wanted: dict[str, Any]
) -> None:
    data = json.dumps(row).encode() + b"\n"
    report = check([data])

    assert report.ok, report.problems
    assert [json.loads(line) for line in canonical_lines([data])] == [wanted]
    assert list(checked_lines([data])) == list(canonical_lines([data]))
    assert [one.rows for one in report.warnings if one.code == f"converted_{form}"] == [1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Write a chat.", "completion": json.dumps([HI, HELLO])},
        {"prompt": "Where from?", "completion": '{"from": "Rome", "value": "IT"}'},
        {"prompt": '{"role": "admin"}', "completion": '[{"role": "admin", "content": "x"}]'},
    ],
    ids=str,
)
def test_an_answer_that_is_json_itself_stays_text(row: dict[str, Any]) -> None:
    assert [json.loads(line) for line in canonical_lines([json.dumps(row).encode()])] == [row]


# A column of a table has values of one type.
IN_TABLES: Final = [shape for shape in SHAPES if shape[0] != "results_as_objects"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz", "rows.parquet", "rows.arrow"])
@pytest.mark.parametrize(("form", "row", "wanted"), IN_TABLES)
def test_it_is_read_so_from_every_kind_of_file(
    tmp_path: Path, name: str, form: str, row: dict[str, Any], wanted: dict[str, Any]
) -> None:
    lines, _ = made(tmp_path, name, KINDS[name]([row, row]))

    assert [json.loads(line) for line in canonical_lines([lines])] == [wanted, wanted], form


def test_messages_as_json_text_in_a_column_of_a_table_are_read_as_in_a_cell(tmp_path: Path) -> None:
    row = {"messages": json.dumps(TALK["messages"])}
    read = [made(tmp_path, name, KINDS[name]([row]))[0] for name in ("rows.parquet", "rows.arrow", "rows.csv")]

    assert [[json.loads(line) for line in canonical_lines([lines])] for lines in read] == [[TALK]] * 3


def test_a_choice_is_told_from_a_number_and_a_mask_of_tokens_from_one_of_loss() -> None:
    row = {**TALK, "loss_amount": 5000, "training_cost": "12 EUR", "attention_mask": [1, 1], "labels": ["news"]}
    report = check([json.dumps(row).encode()])

    assert report.ok, report.problems
    assert report.dropped_columns == ("attention_mask", "labels", "loss_amount", "training_cost")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "whole columns"),
        ({"version": "1", "data": [{"messages": []}]}, "a list under data"),
        ({"custom_id": "1", "body": {"messages": []}}, "lies under body"),
        ({"request": {"messages": []}, "response": {}}, "lies under request"),
        ({"chat": [HI, HELLO]}, '{"messages": "chat"}'),
    ],
)
def test_a_row_that_is_no_row_is_told_what_it_is(row: dict[str, Any], words: str) -> None:
    (problem,) = check([json.dumps(row).encode()]).problems

    assert (problem.code, words in problem.message) == ("unknown_format", True), problem.message


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ["Hi?"]},
        {"conversations": ["Hi?", "Hello.", "And?"]},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi?"]}},
        {"messages": {"role": "user", "content": "Hi?"}},
        {"messages": [["narrator", "Once."], ["assistant", "Hello."]]},
        {"conversations": [{"from": "human", "content": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        {"messages": [HI, HELLO], "tools": ["clock"]},
        {"messages": [HI, {"type": "web_search_call", "id": "w"}, HELLO]},
        {"messages": [HI, {"type": "function_call", "name": "clock", "arguments": "{}"}, HELLO]},
        {"messages": [{"role": ["User"], "content": "x"}, {"role": "Chatbot", "content": "y"}]},
    ],
    ids=str,
)
def test_what_is_no_whole_conversation_stays_refused(row: dict[str, Any]) -> None:
    assert not check([json.dumps(row).encode()]).ok
