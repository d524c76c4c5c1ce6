"""Figures of an evaluation: means, intervals, paired differences, win rates and slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shared.contract.evaluation import CreateEvaluation, Figure
from shared.contract.evaluation_run import StoredAnswer
from shared.rows import figures
from shared.rows.figures import Series, difference, figure

# Sleep gained by ten people under two drugs (Cushny and Peebles 1905, the data of Student's paper).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# scipy 1.17.1: stats.bootstrap(…, method="percentile", n_resamples=200_000), the second one with paired=True.
SCIPY_MEAN = (-0.26, 1.84)
SCIPY_PAIRED = (0.95, 2.38)


def series(values: list[float], *, weights: list[float] | None = None, **more: Any) -> Series:
    items = tuple(range(1, len(values) + 1))
    return Series(items, np.array(values), np.array(weights or [1.0] * len(values)), **more)


def request(**values: Any) -> CreateEvaluation:
    asked = {"subjects": ["base", "tuned"], "items": {"type": "suite", "suite": "general"}, "against": "base"}
    return CreateEvaluation.model_validate(asked | values)


def answer(item: int, subject: int, scores: dict[str, float], **values: Any) -> StoredAnswer:
    kept = {"part": "items", "line": item, "prompt": "?", "reference": "!", "scores": scores}
    return StoredAnswer.model_validate({"item": item, "subject": subject, **kept, **values})


def report(asked: CreateEvaluation, answers: list[StoredAnswer]) -> Any:
    return figures.report(asked, answers, interrupt=lambda: None)


def test_the_interval_of_a_mean_is_that_of_a_known_library() -> None:
    made = figure(series(FIRST), seed=0)

    assert made.mean == pytest.approx(0.75)
    assert (made.low, made.high) == (pytest.approx(SCIPY_MEAN[0], abs=0.06), pytest.approx(SCIPY_MEAN[1], abs=0.06))


def test_a_paired_difference_is_sharper_than_two_intervals_and_is_that_of_a_known_library() -> None:
    apart = difference(series(SECOND), series(FIRST), seed=0)

    assert apart.mean == pytest.approx(1.58)
    assert (apart.low, apart.high) == (
        pytest.approx(SCIPY_PAIRED[0], abs=0.06),
        pytest.approx(SCIPY_PAIRED[1], abs=0.06),
    )
    first, second = figure(series(FIRST), seed=0), figure(series(SECOND), seed=0)
    assert first.high > second.low, "beside each other they overlap"
    assert apart.low > 0, "together they do not"


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_the_same() -> None:
    assert figure(series(FIRST), seed=7) == figure(series(FIRST), seed=7)
    assert figure(series(FIRST), seed=8).low == pytest.approx(figure(series(FIRST), seed=7).low, abs=0.1)


def test_drawing_in_pieces_changes_no_interval_beyond_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = figure(series(FIRST), seed=1)
    monkeypatch.setattr(figures, "DRAWN_AT_ONCE", 50)
    assert figure(series(FIRST), seed=1).low == pytest.approx(whole.low, abs=0.1)


@pytest.mark.parametrize(("values", "mean"), [([], None), ([0.5], 0.5)])
def test_no_item_has_no_mean_and_one_item_has_no_interval(values: list[float], mean: float | None) -> None:
    assert figure(series(values), seed=0) == Figure(n=len(values), mean=mean, low=None, high=None)


def test_equal_values_have_an_interval_without_width() -> None:
    assert figure(series([1.0] * 5), seed=0) == Figure(n=5, mean=1.0, low=1.0, high=1.0)


def test_a_loss_weighs_items_by_their_tokens_and_perplexity_is_its_exponential() -> None:
    loss = series([1.0, 3.0], weights=[3.0, 1.0])
    perplexity = series([1.0, 3.0], weights=[3.0, 1.0], exponential=True)

    assert loss.mean() == pytest.approx(1.5)
    assert perplexity.mean() == pytest.approx(math.exp(1.5))
    assert figure(perplexity, seed=3).high == pytest.approx(math.exp(figure(loss, seed=3).high))


def test_a_perplexity_too_large_for_a_number_is_none_instead_of_infinity() -> None:
    assert figure(series([1000.0, 1000.0], exponential=True), seed=0).mean is None


def test_a_difference_counts_the_items_that_both_have() -> None:
    asked = request(measures=[{"type": "exact_match", "name": "right"}])
    answers = [
        answer(1, 0, {"right": 0.0}),
        answer(1, 1, {"right": 1.0}),
        answer(2, 0, {"right": 0.0}),
        answer(2, 1, {}, error={"code": "context_length_exceeded", "message": "Too long."}),
        answer(3, 0, {"right": 1.0}),
        answer(3, 1, {"right": 1.0}),
    ]

    made = report(asked, answers)

    (apart,) = made.differences
    assert (apart.subject, apart.against, apart.measure) == ("tuned", "base", "right")
    assert (apart.n, apart.mean) == (2, 0.5)
    assert made.subjects["tuned"].measures["right"].n == 2
    assert (made.items, made.failures, made.subjects["tuned"].failures) == (3, 1, 1)


def test_a_win_rate_halves_ties_and_heeds_which_way_is_better() -> None:
    measures = [{"type": "loss", "name": "loss"}, {"type": "win_rate", "name": "wins", "by": "loss"}]
    losses = [(1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (1.0, 0.9)]
    answers = [
        answer(item, subject, {"loss": loss}, loss_tokens=1)
        for item, pair in enumerate(losses, start=1)
        for subject, loss in enumerate(pair)
    ]

    made = report(request(measures=measures), answers)

    assert made.subjects["tuned"].measures["wins"].mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert made.subjects["base"].measures["wins"].n == 0
    assert [one.measure for one in made.differences] == ["loss"]
    assert made.measures["loss"].better == "lower"


def test_slices_have_figures_of_their_own_and_rows_without_the_key_are_one_of_them() -> None:
    asked = request(measures=[{"type": "exact_match", "name": "right"}], slices=["language"])
    values = [("de", 1.0), ("de", 0.0), ("en", 1.0), (None, 0.0)]
    answers = [
        answer(item, subject, {"right": value}, slices={"language": language})
        for item, (language, value) in enumerate(values, start=1)
        for subject in (0, 1)
    ]

    made = report(asked, answers)

    assert [(one.value, one.items) for one in made.slices] == [("de", 2), (None, 1), ("en", 1)]
    assert made.slices[0].subjects["tuned"].measures["right"].mean == 0.5


def test_the_forgetting_set_is_reported_apart() -> None:
    asked = request(measures=[{"type": "exact_match", "name": "right"}], forgetting=True)
    answers = [answer(1, 0, {"right": 1.0}), answer(1, 0, {"right": 0.0}, part="forgetting")]

    made = report(asked, answers)

    assert made.subjects["base"].measures["right"].mean == 1.0
    assert made.forgetting.subjects["base"].measures["right"].mean == 0.0


def test_nothing_answered_is_a_report_without_figures() -> None:
    made = report(request(), [])

    assert made.items == 0
    assert made.subjects["base"].measures["loss"] == Figure(n=0, mean=None, low=None, high=None)


def test_a_report_stops_when_it_is_told_to() -> None:
    class Over(Exception):
        pass

    def stop() -> None:
        raise Over

    with pytest.raises(Over):
        figures.report(request(), [], interrupt=stop)
