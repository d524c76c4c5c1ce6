from __future__ import annotations

import pytest

from shared.rows import formats
from shared.rows.rules import check_row


def row(**flags: object) -> dict:
    first = {"from": "gpt", "value": "DO NOT LEARN", **flags}
    return {"conversations": [{"from": "human", "value": "u"}, first, {"from": "gpt", "value": "good", "train": True}]}


@pytest.mark.parametrize(
    "flags", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 1, "train": False}, {"train": 0}]
)
def test_an_item_that_is_not_to_be_trained_gets_weight_zero(flags: dict) -> None:
    assert not check_row(row(**flags), "sharegpt").problems
    assert [one.get("weight") for one in formats.normalise(row(**flags), "sharegpt")["messages"]] == [None, 0, 1]


@pytest.mark.parametrize(
    "flags",
    [
        {"mask": True},
        {"train_detail": []},
        {"loss_scale": 0.5},
        {"train": "no"},
        {"learn": False},
        {"ignore_loss": True},
        {"isTrained": False},
        {"loss_weight": 0.0},
        {"include": False},
        {"is_target": 0},
    ],
)
def test_a_flag_that_is_not_offered_is_refused_by_name(flags: dict) -> None:
    (problem,) = check_row(row(**flags), "sharegpt").problems

    assert problem.param == f"conversations[1].{next(iter(flags))}"


@pytest.mark.parametrize("flag", [{"train": True}, {"loss": True}, {"weight": 1}])
def test_a_flag_that_asks_to_train_a_question_is_refused_by_name(flag: dict) -> None:
    items = [{"from": "human", "value": "u", **flag}, {"from": "gpt", "value": "a"}]
    (problem,) = check_row({"conversations": items}, "sharegpt").problems

    assert (problem.param, problem.code) == (f"conversations[0].{next(iter(flag))}", "invalid_weight")


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": None}])
def test_a_question_may_say_that_it_is_not_trained(flag: dict) -> None:
    items = [{"from": "human", "value": "u", **flag}, {"from": "gpt", "value": "a"}]

    assert not check_row({"conversations": items}, "sharegpt").problems
