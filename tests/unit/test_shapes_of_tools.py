"""Rows as OpenPipe, torchtune, NVIDIA's and argilla's sets write them; what a message says twice must be the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_public_shapes import A, U, read, refused

WORSE = {"role": "assistant", "content": "No."}
PAIR = {"messages": [U], "chosen": A, "rejected": WORSE}
CALL = {"name": "weather", "arguments": '{"city": "Rome"}'}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [U, A], "rejected_message": WORSE, "split": "TRAIN"}, "rejected"),
        ({"chosen_conversations": [U, A], "rejected_conversations": [U, WORSE]}, "chosen_conversations"),
    ],
)
def test_the_worse_answer_is_trained_as_such_under_whichever_name(row: dict[str, Any], form: str) -> None:
    (pair,), report = read(row)

    assert pair == PAIR
    assert f"converted_{form}" in {warning.code for warning in report.warnings}


def test_a_worse_conversation_without_a_better_one_is_refused_by_name() -> None:
    assert refused({"messages": [U, A], "chosen_conversations": [U, A]})[:2] == ("chosen_conversations", "unknown_key")


def test_calls_in_both_forms_of_a_message_must_be_the_same() -> None:
    call = {"id": "c1", "type": "function", "function": CALL}
    both = {"role": "assistant", "content": None, "function_call": CALL, "tool_calls": [call]}
    (row,), _ = read({"messages": [U, both]})
    other = {**both, "function_call": {**CALL, "arguments": '{"city": "Oslo"}'}}

    assert [made["function"] for made in row["messages"][1]["tool_calls"]] == [CALL]
    assert refused({"messages": [U, other]})[:2] == ("messages[1].function_call", "unknown_key")
    assert refused({"messages": [U, {**both, "tool_calls": [call, call]}]})[0] == "messages[1].function_call"


def test_empty_keys_of_every_role_mean_nothing() -> None:
    (row,), _ = read({"messages": [{**U, "tool_calls": [], "reasoning_content": "", "audio": None}, A]})

    assert row == {"messages": [U, A]}
    assert refused({"messages": [{**U, "tool_calls": [{"id": "c1"}]}, A]})[1] == "unknown_key"


def test_reasoning_that_nobody_can_read_is_told() -> None:
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    (row,), report = read({"messages": [U, thought, A]})

    assert row == {"messages": [U, A]}
    assert report.dropped_columns == ("messages[].encrypted_content",)


def test_where_else_a_row_stands_is_no_flag_of_loss() -> None:
    row = {"prompt": "Hi", "chosen": "Yes?", "rejected": "No.", "in_gsm8k_train": False}
    (pair,), report = read(row)

    assert pair == PAIR
    assert report.dropped_columns == ("in_gsm8k_train",)
    assert refused({"messages": [U, A], "train_in_part": True})[:2] == ("train_in_part", "unknown_key")


def test_roles_of_calls_may_be_written_with_a_hyphen() -> None:
    talk = [
        {"from": "human", "value": "Hi"},
        {"from": "function-call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "function-response", "value": "21"},
        {"from": "gpt", "value": "Yes?"},
    ]
    (row,), _ = read({"conversations": talk})

    _, called, result, answer = row["messages"]
    assert [call["function"] for call in called["tool_calls"]] == [CALL]
    assert (result["role"], result["content"], answer) == ("tool", "21", A)
