"""The demo's data can show generalisation only if the splits are really apart."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from examples import tickets
from examples.demo import rates

SPLITS = tuple(tickets.ROWS)


def messages(split: tickets.Split) -> list[str]:
    return [row["messages"][1]["content"] for row in tickets.rows(split)]


def problem_sentence(split: tickets.Split) -> set[str]:
    return {sentence for category in tickets.PROBLEMS.values() for sentence in category[split]}


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_two_splits_share_no_message_no_problem_sentence_no_name_and_no_order(
    one: tickets.Split, other: tickets.Split
) -> None:
    assert not set(messages(one)) & set(messages(other))
    assert not problem_sentence(one) & problem_sentence(other)
    assert not set(tickets.NAMES[one]) & set(tickets.NAMES[other])
    assert not set(tickets.ORDER_RANGES[one]) & set(tickets.ORDER_RANGES[other])


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_its_message(split: tickets.Split) -> None:
    for row in tickets.rows(split):
        system, user, assistant = row["messages"]
        ticket = json.loads(assistant["content"])
        assert system["content"] == tickets.SYSTEM
        assert list(ticket) == ["category", "product", "order_id", "priority", "action"]
        assert ticket["product"] in user["content"]
        assert re.search(rf"\b{ticket['order_id']}\b", user["content"])
        assert any(wish in user["content"] for wish in tickets.WISHES[ticket["action"]])


@pytest.mark.parametrize("split", SPLITS)
def test_no_message_comes_twice(split: tickets.Split) -> None:
    assert len(set(messages(split))) == tickets.ROWS[split]


def test_the_same_seed_writes_the_same_rows() -> None:
    assert tickets.rows("train", seed=3) == tickets.rows("train", seed=3) != tickets.rows("train", seed=4)


def test_an_answer_counts_only_if_it_is_the_ticket_and_nothing_else() -> None:
    expected = tickets.Ticket("late", "tent", "A9000", "low", "call").text()
    answers = (expected, f"Sure! {expected}", expected.replace("low", "high"), "[1]")
    rows = [{"expected": expected, "tuned": answer} for answer in answers]

    assert rates(rows, "tuned") == {"valid_json": 0.5, "exact": 0.25}
