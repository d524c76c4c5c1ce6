"""From scores to figures: means, intervals by bootstrap, paired differences, slices. Pure.

Intervals are percentile bootstraps (Efron 1979) over items: the items are drawn again with replacement, and the figure
is taken of each draw. A difference is drawn pairwise (both subjects on the same items), which is what makes it sharper
than two intervals beside each other. The draws are seeded: the same scores give the same intervals.

Loss, perplexity and token accuracy weigh an item by its tokens, so that they are those of all tokens together. The
perplexity of a draw is the exponential of its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.contract.evaluation import (
    CONFIDENCE,
    Difference,
    EvaluationOrder,
    EvaluationReport,
    Figure,
    LikelihoodMeasure,
    Measure,
    MeasureFacts,
    ReportOfItems,
    SliceFigures,
    SubjectFigures,
    WinRateMeasure,
    better,
)
from shared.contract.evaluation_run import StoredAnswer

RESAMPLES: Final = 2000
DRAWN_AT_ONCE: Final = 1_000_000  # numbers: bounds the memory of a bootstrap
MAX_SLICES: Final = 50  # values of one key; the most frequent ones

Numbers = npt.NDArray[np.float64]
Interrupt = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Series:
    """One subject's values of one measure, by item. All arrays have one entry an item."""

    items: tuple[int, ...]
    values: Numbers
    weights: Numbers
    exponential: bool = False  # the figure is the exponential of the mean

    def at(self, items: Sequence[int]) -> Series:
        """The same of some of its items."""
        place = {item: place for place, item in enumerate(self.items)}
        kept = [place[item] for item in items]
        return Series(tuple(items), self.values[kept], self.weights[kept], self.exponential)

    def mean(self) -> float | None:
        """The figure itself; None without an item, or where it is not finite."""
        return _finite(self._of(self.values * self.weights, self.weights)) if self.items else None

    def drawn(self, draws_RN: npt.NDArray[np.int64]) -> Numbers:  # noqa: N803 -- R draws of N items
        """The figure of each draw, (R,)."""
        return self._of((self.values * self.weights)[draws_RN], self.weights[draws_RN])

    def _of(self, weighted: Numbers, weights: Numbers) -> Numbers:
        with np.errstate(over="ignore"):
            mean: Numbers = weighted.sum(axis=-1) / weights.sum(axis=-1)
            return np.exp(mean) if self.exponential else mean


def _finite(value: float | Numbers) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def figure(series: Series, *, seed: int) -> Figure:
    """Mean and interval. One item has no interval."""
    low, high = _interval(len(series.items), series.drawn, seed=seed)
    return Figure(n=len(series.items), mean=series.mean(), low=low, high=high)


def difference(mine: Series, other: Series, *, seed: int) -> Figure:
    """`mine` less `other` on the items that both have, drawn pairwise."""
    have = set(other.items)
    items = [item for item in mine.items if item in have]
    mine, other = mine.at(items), other.at(items)
    low, high = _interval(len(items), lambda draws: mine.drawn(draws) - other.drawn(draws), seed=seed)
    left, right = mine.mean(), other.mean()
    mean = None if left is None or right is None else left - right
    return Figure(n=len(items), mean=mean, low=low, high=high)


def _interval(
    count: int, drawn: Callable[[npt.NDArray[np.int64]], Numbers], *, seed: int
) -> tuple[float | None, float | None]:
    if count < 2:
        return None, None
    random = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // count)
    figures = np.concatenate(
        [
            drawn(random.integers(0, count, (min(at_once, RESAMPLES - begun), count)))
            for begun in range(0, RESAMPLES, at_once)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # where a perplexity is beyond all numbers
        low, high = np.quantile(figures, [tail, 1 - tail])
    return _finite(low), _finite(high)


# --- the report -------------------------------------------------------------------------------------------------------


class _Part:
    """The answers to one set of items."""

    def __init__(self, request: EvaluationOrder, answers: Sequence[StoredAnswer], interrupt: Interrupt) -> None:
        self._request, self._answers, self._interrupt = request, answers, interrupt
        self._by_subject: list[list[StoredAnswer]] = [[] for _ in request.subjects]
        for answer in answers:
            self._by_subject[answer.subject].append(answer)

    @property
    def items(self) -> int:
        return len({answer.item for answer in self._answers})

    def report(self) -> ReportOfItems:
        return ReportOfItems(
            subjects=self.subjects(),
            differences=self.differences(),
            items=self.items,
            failures=sum(answer.error is not None for answer in self._answers),
        )

    def subjects(self) -> dict[str, SubjectFigures]:
        return {
            name: SubjectFigures(
                measures={measure.name: self._figure(place, measure) for measure in self._request.measures},
                failures=sum(answer.error is not None for answer in self._by_subject[place]),
            )
            for place, name in enumerate(self._request.subjects)
        }

    def differences(self) -> list[Difference]:
        request = self._request
        if request.against is None:
            return []
        other = request.subjects.index(request.against)
        return [
            self._versus(place, other, measure)
            for place in range(len(request.subjects))
            if place != other
            for measure in request.measures
            if not isinstance(measure, WinRateMeasure)  # it is a comparison already
        ]

    def _figure(self, place: int, measure: Measure) -> Figure:
        self._interrupt()
        return figure(self.series(place, measure), seed=self._request.seed)

    def _versus(self, place: int, other: int, measure: Measure) -> Difference:
        self._interrupt()
        names = self._request.subjects
        apart = difference(self.series(place, measure), self.series(other, measure), seed=self._request.seed)
        return Difference(
            subject=names[place],
            against=names[other],
            measure=measure.name,
            n=apart.n,
            mean=apart.mean,
            low=apart.low,
            high=apart.high,
        )

    def series(self, place: int, measure: Measure) -> Series:
        """A subject's values of a measure."""
        if isinstance(measure, WinRateMeasure):
            return self._wins(place, measure)
        answers = [answer for answer in self._by_subject[place] if measure.name in answer.scores]
        by_tokens = isinstance(measure, LikelihoodMeasure)
        return Series(
            items=tuple(answer.item for answer in answers),
            values=np.array([answer.scores[measure.name] for answer in answers], dtype=np.float64),
            weights=np.array([answer.loss_tokens or 0 if by_tokens else 1 for answer in answers], dtype=np.float64),
            exponential=measure.type == "perplexity",
        )

    def _wins(self, place: int, measure: WinRateMeasure) -> Series:
        """1, 0.5 or 0 for each item that both have a value for. A subject has no rate against itself."""
        request = self._request
        assert request.against is not None, "the request's own check says so"
        other = request.subjects.index(request.against)
        by = next(candidate for candidate in request.measures if candidate.name == measure.by)
        mine = {} if place == other else self._scores(place, by)
        theirs = self._scores(other, by)
        sign = 1.0 if better(by) == "higher" else -1.0
        items = tuple(item for item in mine if item in theirs)
        apart = np.array([sign * (mine[item] - theirs[item]) for item in items], dtype=np.float64)
        return Series(items, (np.sign(apart) + 1) / 2, np.ones(len(items)))

    def _scores(self, place: int, measure: Measure) -> dict[int, float]:
        answers = self._by_subject[place]
        return {answer.item: answer.scores[measure.name] for answer in answers if measure.name in answer.scores}


def report(request: EvaluationOrder, answers: Sequence[StoredAnswer], *, interrupt: Interrupt) -> EvaluationReport:
    """All figures of an evaluation. `interrupt` is called before each measure, and may raise.

    Args:
        answers: in the order of items.
    """
    asked = [answer for answer in answers if answer.part == "items"]
    whole = _Part(request, asked, interrupt).report()
    forgetting = [answer for answer in answers if answer.part == "forgetting"]
    return EvaluationReport(
        **dict(whole),
        measures={
            measure.name: MeasureFacts(type=measure.type, better=better(measure)) for measure in request.measures
        },
        slices=[slice_ for key in request.slices for slice_ in _slices(request, asked, key, interrupt)],
        forgetting=_Part(request, forgetting, interrupt).report() if request.forgetting else None,
        resamples=RESAMPLES,
        seed=request.seed,
    )


def _slices(
    request: EvaluationOrder, answers: Sequence[StoredAnswer], key: str, interrupt: Interrupt
) -> list[SliceFigures]:
    """Figures for each value of a key, the most frequent first."""
    groups = _by_value(answers, key)
    parts = [(value, _Part(request, group, interrupt)) for value, group in groups.items()]
    parts.sort(key=lambda part: (-part[1].items, part[0] or ""))
    return [
        SliceFigures(key=key, value=value, items=part.items, subjects=part.subjects())
        for value, part in parts[:MAX_SLICES]
    ]


def _by_value(answers: Sequence[StoredAnswer], key: str) -> Mapping[str | None, list[StoredAnswer]]:
    def value(answer: StoredAnswer) -> tuple[bool, str]:
        text = answer.slices.get(key)
        return text is not None, text or ""

    ordered = sorted(answers, key=value)  # stable: items stay in order
    return {text if given else None: list(group) for (given, text), group in groupby(ordered, key=value)}
