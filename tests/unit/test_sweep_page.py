"""In which order a sweep's page shows its trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from api.ui.sweep_pages import by_value


def trial(number: int, value: float | None, rung: int = 0) -> Any:
    return SimpleNamespace(number=number, value=value, rung=rung)


@pytest.mark.parametrize(("better", "order"), [("lower", [3, 1, 0, 2, 4]), ("higher", [3, 0, 1, 2, 4])])
def test_the_best_is_first_and_what_has_no_value_last(better: str, order: list[int]) -> None:
    trials = [trial(0, 0.9), trial(1, 0.5), trial(2, None), trial(3, 0.7, rung=1), trial(4, None)]
    sweep: Any = SimpleNamespace(trials=trials, better=better, best=None)

    assert [each.number for each in by_value(sweep)] == order


def test_the_one_that_was_chosen_comes_before_all() -> None:
    sweep: Any = SimpleNamespace(trials=[trial(0, 0.5), trial(1, 0.6)], better="lower", best=1)

    assert [each.number for each in by_value(sweep)] == [1, 0]
