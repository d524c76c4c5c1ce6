"""What a tracker is told of a job: each step once, in rising order, whole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from shared.chores.points import Recorded, figures, latest, whole

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)


def events(*steps: int, first: int = 1, **figures: float) -> list[Recorded]:
    """A metrics event a step, whose loss is its place among the events."""
    return [
        Recorded(seq, BEGAN + timedelta(seconds=seq), {"step": step, "total_steps": 9, "train_loss": float(seq)})
        for seq, step in enumerate(steps, first)
    ]


def validation(seq: int, step: int, **data: Any) -> Recorded:
    return Recorded(seq, BEGAN + timedelta(seconds=seq), {"step": step, "valid_loss": 0.5, **data})


def test_the_newest_step_waits_for_its_validation_while_the_job_runs() -> None:
    points, used = whole(events(1, 2, 3), final=False, after=None)

    assert ([point.step for point in points], used) == ([1, 2], 2)
    assert whole(events(3, first=3), final=False, after=2) == ([], None)

    points, used = whole([*events(3, first=3), validation(4, 3), *events(4, first=5)], final=False, after=2)

    assert [(point.step, point.figures) for point in points] == [(3, {"train_loss": 3.0, "valid_loss": 0.5})]
    assert used == 4


def test_all_steps_of_an_ended_job_are_told() -> None:
    points, used = whole([*events(1, 2), validation(3, 2)], final=True, after=None)

    assert [point.step for point in points] == [1, 2]
    assert points[-1].figures == {"train_loss": 2.0, "valid_loss": 0.5}
    assert used == 3


def test_steps_that_a_resumed_attempt_repeats_are_told_once_and_the_newest_as_it_was_last() -> None:
    points, used = whole(events(5, 6, 7, 5, 6, 7, 8), final=True, after=5)

    assert [(point.step, point.figures["train_loss"]) for point in points] == [(6, 2.0), (7, 6.0), (8, 7.0)]
    assert used == 7


def test_a_part_that_was_told_changes_nothing_of_the_rest() -> None:
    story = [*events(1, 2, 3, 4), validation(5, 4), *events(3, 4, 5, 6, first=6), validation(10, 6, full=True)]
    at_once, _ = whole(story, final=True, after=None)

    in_parts, cursor, after = [], 0, None
    for known in range(1, len(story) + 1):
        fresh = [event for event in story[:known] if event.seq > cursor]
        points, used = whole(fresh, final=known == len(story), after=after)
        in_parts += points
        cursor, after = used or cursor, points[-1].step if points else after

    assert in_parts == at_once


def test_figures_are_numbers_and_those_of_all_validation_rows_are_called_full() -> None:
    assert figures({"step": 2, "total_steps": 9, "train_loss": 1, "note": "x", "good": True}) == {"train_loss": 1.0}
    assert figures({"step": 2, "valid_loss": 0.5, "full": True}) == {"full_valid_loss": 0.5}


def test_an_event_file_has_the_later_figures_of_a_repeated_step() -> None:
    assert [(point.step, point.figures["train_loss"]) for point in latest(events(1, 2, 3, 2, 3))] == [
        (1, 1.0),
        (2, 4.0),
        (3, 5.0),
    ]
