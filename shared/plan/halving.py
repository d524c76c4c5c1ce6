"""Successive halving (Jamieson & Talwalkar 2016, algorithm 1; the rungs as in Li et al. 2018, Hyperband). Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RungVerdict:
    """How a trial stands on a rung. `rank` counts from 1."""

    rank: int
    goes_on: bool


def rung_count(trials: int, factor: int) -> int:
    """How often the trials are cut to 1/factor before one is left: floor(log_factor(trials))."""
    count = 0
    while trials >= factor:
        trials //= factor
        count += 1
    return count


def rung_steps(trials: int, factor: int, first_step: int) -> tuple[int, ...]:
    """Optimizer steps at which trials are compared, lowest first."""
    return tuple(first_step * factor**number for number in range(rung_count(trials, factor)))


def verdicts(
    values: Mapping[int, float | None], *, entered: int, factor: int, lower_is_better: bool
) -> dict[int, RungVerdict]:
    """Who goes on from a rung: the best floor(entered / factor), and never fewer than one.

    Args:
        values: number of each trial that has come to the rung -> its value there; None or NaN: it has none, and is
            behind all that have.
        entered: trials that were to come, with those that ended on the way.

    Of equal values the trial of the lower number is the better one, so that nothing depends on who came first.
    """

    def place(number: int) -> tuple[bool, float, int]:
        value = values[number]
        if value is None or math.isnan(value):
            return True, 0.0, number
        return False, value if lower_is_better else -value, number

    kept = max(1, entered // factor)
    ranked = sorted(values, key=place)
    return {number: RungVerdict(rank, rank <= kept) for rank, number in enumerate(ranked, start=1)}
