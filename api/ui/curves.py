"""Curves of a run, from its metrics events: the whole history, thinned where it has more points than a chart shows.

Thinning keeps the smallest and the largest value of each of equally many neighbouring points, so no spike is lost.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, get_args

from shared.jobs.metrics_file import Figures

Axis = Literal["step", "tokens", "time"]
AXES: Final = get_args(Axis)
MOST_POINTS: Final = 2000  # of one series


class Chart(NamedTuple):
    """What is drawn together, and over which of a run's series."""

    name: str
    title: str
    unit: str
    series: tuple[tuple[str, str], ...]  # name, label


CHARTS: Final = (
    Chart("loss", "Loss", "nats per token", (("train_loss", "training"), ("valid_loss", "validation"))),
    Chart("learning_rate", "Learning rate", "", (("learning_rate", "learning rate"),)),
    Chart("grad_norm", "Gradient norm", "L2, before clipping", (("grad_norm", "gradient norm"),)),
    Chart("throughput", "Throughput", "tokens per second", (("throughput", "tokens per second"),)),
    Chart("memory", "Memory", "GiB held by the first rank", (("memory", "memory"),)),
)
_GIB: Final = 2**30
SERIES: Final = tuple(name for chart in CHARTS for name, _ in chart.series)
Point = tuple[float, float]


@dataclass
class RunCurves:
    """The series of one run, in the order of its events; a step that is repeated replaces what it was."""

    axis: Axis
    begun: float | None = None  # Unix seconds of the first event
    tokens: int = 0
    step: int = 0
    _points: dict[str, dict[int, Point]] = field(default_factory=lambda: {name: {} for name in SERIES})

    def add(self, figures: Figures) -> dict[str, Point]:
        """Take an event in; the points that it adds, by series."""
        at, data = figures.at.timestamp(), figures.data
        self.begun = at if self.begun is None else self.begun
        step = int(data["step"])
        values = {name: data.get(name) for name in SERIES}
        values["throughput"] = self._throughput(step, data)
        held = data.get("memory_bytes")
        values["memory"] = None if held is None else held / _GIB
        self.tokens, self.step = int(data.get("trained_tokens", self.tokens)), step
        x = {"step": float(step), "tokens": float(self.tokens), "time": at - self.begun}[self.axis]
        added = {name: (x, float(value)) for name, value in values.items() if value is not None}
        for name, point in added.items():
            self._points[name][step] = point
        return added

    def _throughput(self, step: int, data: Mapping[str, Any]) -> float | None:
        """Tokens of the steps since the last event, by how long a step took. A resumed run has no last event."""
        seconds, tokens = data.get("seconds_per_step"), data.get("trained_tokens")
        if not seconds or tokens is None or step <= self.step or tokens < self.tokens:
            return None
        return float((tokens - self.tokens) / ((step - self.step) * seconds))

    def series(self, name: str) -> list[Point]:
        """The points of a series by x, at most `MOST_POINTS` of them."""
        return thinned(sorted(self._points[name].values()))

    @property
    def last(self) -> dict[str, float]:
        """The newest value of each series that has one."""
        return {name: points[max(points)][1] for name, points in self._points.items() if points}

    @property
    def lowest(self) -> dict[str, float]:
        return {name: min(y for _, y in points.values()) for name, points in self._points.items() if points}


def run_of(history: Iterable[Figures], axis: Axis) -> RunCurves:
    run = RunCurves(axis)
    for figures in history:
        run.add(figures)
    return run


def thinned(points: Sequence[Point], *, most: int = MOST_POINTS) -> list[Point]:
    """The first, the last, and the extremes of each bucket between, in their order."""
    if len(points) <= most:
        return list(points)
    inner, buckets = points[1:-1], (most - 2) // 2
    kept: list[Point] = []
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        low, high = min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])
        kept += [low] if low == high else sorted((low, high))
    return [points[0], *kept, points[-1]]


def document(runs: Mapping[str, RunCurves]) -> dict[str, Any]:
    """What charts.js draws: each chart with the series of every run, labelled by the run where there are several."""
    alone = len(runs) == 1
    return {
        "charts": [
            {
                "name": chart.name,
                "title": chart.title,
                "unit": chart.unit,
                "series": [
                    {
                        "name": name,
                        "run": number,
                        "label": label if alone else title if name == chart.series[0][0] else f"{title} · {label}",
                        "points": run.series(name),
                    }
                    for number, (title, run) in enumerate(runs.items())
                    for name, label in chart.series
                ],
            }
            for chart in CHARTS
        ]
    }
