"""The points that a tracker gets of a job: one per optimizer step, made of the job's events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

_NO_FIGURES: Final = frozenset({"step", "total_steps", "full"})


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event of a job; `seq` counts the job's events from 1."""

    seq: int
    at: datetime
    data: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The figures of a step. `at`: of its first event, in Unix seconds."""

    step: int
    at: float
    figures: dict[str, float]


def figures(data: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics event under the names that trackers show; those of all validation rows are `full_…`."""
    prefix = "full_" if data.get("full") else ""
    return {
        f"{prefix}{name}": float(value)
        for name, value in data.items()
        if name not in _NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }


def whole(events: Iterable[Recorded], *, final: bool, after: int | None) -> tuple[list[CurvePoint], int | None]:
    """The steps beyond `after` about which nothing more will come, and the last event that they have used up.

    Trackers take steps in rising order, and each once: a step that a resumed attempt repeats is there already. Unless
    `final`, the newest step waits, because its validation may come yet. The second value is None where there was no
    event.
    """
    points: list[CurvePoint] = []
    used: int | None = None
    last_of_earlier: int | None = None
    newest = -1 if after is None else after
    for event in events:
        step = None if event.data is None else event.data.get("step")
        if isinstance(step, int) and step > newest:
            newest = step
            points.append(CurvePoint(step, event.at.timestamp(), figures(event.data or {})))
            last_of_earlier = used
        elif isinstance(step, int) and points and step == points[-1].step:
            points[-1].figures.update(figures(event.data or {}))
        used = event.seq
    if points and not final:
        points.pop()
        used = last_of_earlier
    return points, used


def latest(events: Sequence[Recorded]) -> list[CurvePoint]:
    """Every step, by step; of two figures for one step the later is kept, as in the metrics file."""
    steps: dict[int, CurvePoint] = {}
    for event in events:
        step = None if event.data is None else event.data.get("step")
        if isinstance(step, int):
            point = steps.setdefault(step, CurvePoint(step, event.at.timestamp(), {}))
            point.figures.update(figures(event.data or {}))
    return [steps[step] for step in sorted(steps)]
