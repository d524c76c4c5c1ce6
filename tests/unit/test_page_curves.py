"""The curves of the page: the whole history, thinned without losing a spike, over steps, tokens or time."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest

from api.ui import curves
from shared.jobs.metrics_file import Figures


def step_figures(step: int, *, at: float = 0.0, **data: Any) -> Figures:
    return Figures(datetime.fromtimestamp(1000.0 + at, UTC), {"step": step, **data})


@pytest.mark.parametrize("count", [0, 1, 2, 1999, 2000])
def test_a_short_history_is_drawn_as_it_is(count: int) -> None:
    points = [(float(step), 1 / (step + 1)) for step in range(count)]

    assert curves.thinned(points) == points


@pytest.mark.parametrize("count", [2001, 2002, 6000, 100_003])
def test_a_long_history_has_at_most_two_thousand_points_with_its_ends_and_every_spike(count: int) -> None:
    chance = random.Random(count)
    points = [(float(step), chance.gauss(1, 0.01)) for step in range(count)]
    spikes = [(step, (float(step), value)) for step, value in ((count // 3, 50.0), (count // 2, -50.0))]
    for place, spike in spikes:
        points[place] = spike

    kept = curves.thinned(points)

    assert len(kept) <= curves.MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {spike for _, spike in spikes} <= set(kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})


def test_a_curve_stands_over_steps_tokens_or_time() -> None:
    history = [
        step_figures(1, at=5.0, train_loss=3.0, trained_tokens=10),
        step_figures(2, at=9.0, train_loss=2.0, trained_tokens=25),
    ]

    drawn = {axis: curves.run_of(history, axis).series("train_loss") for axis in curves.AXES}

    assert drawn == {
        "step": [(1.0, 3.0), (2.0, 2.0)],
        "tokens": [(10.0, 3.0), (25.0, 2.0)],
        "time": [(0.0, 3.0), (4.0, 2.0)],
    }


def test_a_step_that_is_trained_again_after_a_resume_is_drawn_once() -> None:
    run = curves.run_of(
        [step_figures(1, train_loss=3.0), step_figures(2, train_loss=9.0), step_figures(2, train_loss=2.0)], "step"
    )

    assert run.series("train_loss") == [(1.0, 3.0), (2.0, 2.0)]
    assert (run.last["train_loss"], run.lowest["train_loss"]) == (2.0, 2.0)


def test_memory_is_drawn_in_gib_and_throughput_over_the_steps_since_the_last_figures() -> None:
    seconds = {"seconds_per_step": 0.5}
    run = curves.run_of(
        [
            step_figures(10, trained_tokens=1000, memory_bytes=2**31, **seconds),
            step_figures(20, trained_tokens=3000, memory_bytes=3 * 2**30, **seconds),
        ],
        "step",
    )

    assert run.series("memory") == [(10.0, 2.0), (20.0, 3.0)]
    assert run.series("throughput")[-1] == (20.0, 400.0)
