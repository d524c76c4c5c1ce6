"""Which settings a sweep tries, and who goes on from a rung: by the definitions of the papers, for any numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.contract.job_request import CreateJob
from shared.contract.sweep import MAX_TRIALS, CreateSweep
from shared.errors import Invalid
from shared.plan import halving
from shared.settle import sweep_trials

RATE, RANK = "tunepool.training.learning_rate", "tunepool.adapter.r"


def sweep(parameters: dict[str, Any], strategy: dict[str, Any] | None = None, **values: Any) -> CreateSweep:
    job = {"model": "tiny", "training_file": "file-1", "validation_file": "file-2", **values.pop("job", {})}
    strategy = strategy or {"type": "grid"}
    return CreateSweep.model_validate({"job": job, "parameters": parameters, "strategy": strategy, **values})


def random(count: int) -> dict[str, Any]:
    return {"type": "random", "trials": count}


def test_a_grid_is_every_combination_in_the_order_in_which_it_was_written() -> None:
    tried = sweep_trials.settings(sweep({RANK: [8, 16], RATE: {"min": 1e-5, "max": 1e-3, "scale": "log", "points": 3}}))

    assert [tuple(trial.values()) for trial in tried] == [
        (8, 1e-5), (8, 1e-4), (8, 1e-3), (16, 1e-5), (16, 1e-4), (16, 1e-3),
    ]  # fmt: skip


@given(
    seed=st.integers(0, 2**31 - 1),
    few=st.integers(1, 20),
    more=st.integers(0, 20),
    low=st.integers(1, 50),
    span=st.integers(1, 500),
    scale=st.sampled_from(["linear", "log"]),
)
def test_draws_lie_in_their_range_and_neither_more_trials_nor_other_fields_change_them(  # noqa: PLR0917
    seed: int, few: int, more: int, low: int, span: int, scale: str
) -> None:
    whole = {"min": low, "max": low + span, "scale": scale}
    real = {"min": low / 7, "max": (low + span) / 7, "scale": scale}
    drawn = sweep_trials.settings(sweep({RANK: whole, RATE: real}, random(few), seed=seed))
    wider = sweep_trials.settings(sweep({"seed": [1, 2], RANK: whole}, random(few + more), seed=seed))

    assert [trial[RANK] for trial in drawn] == [trial[RANK] for trial in wider[:few]]
    assert drawn == sweep_trials.settings(sweep({RANK: whole, RATE: real}, random(few), seed=seed))
    for trial in drawn:
        assert isinstance(trial[RANK], int)
        assert low <= trial[RANK] <= low + span
        assert low / 7 <= trial[RATE] <= (low + span) / 7


def test_whole_numbers_and_values_are_drawn_evenly_and_a_log_range_by_its_magnitudes() -> None:
    fields = {"seed": {"min": 1, "max": 4}, RANK: [8, 16], RATE: {"min": 1e-6, "max": 1e-2, "scale": "log"}}
    drawn = [
        trial for seed in range(16) for trial in sweep_trials.settings(sweep(fields, random(MAX_TRIALS), seed=seed))
    ]

    def share(holds: int) -> float:
        return holds / len(drawn)

    for number in range(1, 5):
        assert share(sum(trial["seed"] == number for trial in drawn)) == pytest.approx(1 / 4, abs=0.03)
    assert share(sum(trial[RANK] == 8 for trial in drawn)) == pytest.approx(1 / 2, abs=0.03)
    assert share(sum(trial[RATE] < 1e-4 for trial in drawn)) == pytest.approx(1 / 2, abs=0.03)


def test_another_seed_draws_others() -> None:
    fields = {RATE: {"min": 0.0, "max": 1.0}}
    first, second = (sweep_trials.settings(sweep(fields, random(5), seed=seed)) for seed in (0, 1))

    assert all(one != other for one, other in zip(first, second, strict=True))


def test_the_body_of_a_trial_is_the_job_with_its_values_its_group_and_its_labels() -> None:
    wanted = sweep(
        {"hyperparameters.n_epochs": [2], RANK: [4]},
        job={"method": {"type": "dpo"}, "metadata": {"team": "a"}, "tunepool": {"adapter": {"method": "lora"}}},
        seed=5,
    )

    made = sweep_trials.body(wanted, "sweep_1", 3, sweep_trials.settings(wanted)[0])

    assert made["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}}
    assert made["tunepool"] == {"adapter": {"method": "lora", "r": 4}, "queue": {"group": "sweep_1"}}
    assert made["metadata"] == {"team": "a", "tunepool_sweep": "sweep_1", "tunepool_trial": "3"}
    assert made["seed"] == 5
    assert CreateJob.model_validate(made).seed == 5


def test_halving_looks_at_the_validation_file_where_it_compares() -> None:
    strategy = {"type": "halving", "trials": 9, "first_step": 12}
    made = sweep_trials.body(sweep({RANK: [4, 8]}, strategy), "sweep_1", 0, {RANK: 4})
    finer = {"tunepool": {"training": {"eval": {"steps": 4}}}}
    kept = sweep_trials.body(sweep({RANK: [4, 8]}, strategy, job=finer), "sweep_1", 0, {RANK: 4})

    assert made["tunepool"]["training"]["eval"] == {"steps": 12}
    assert kept["tunepool"]["training"]["eval"] == {"steps": 4}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({RANK: {"values": [8], "min": 1}}, "give either"),
        ({RANK: {"min": 8}}, "min and max"),
        ({RANK: {"min": 8, "max": 8}}, "min below max"),
        ({RANK: {"min": 0, "max": 8, "scale": "log"}}, "above 0"),
        ({RANK: [8, 8]}, "twice"),
        ({RANK: {"values": [8], "points": 3}}, "belong to a range"),
        ({"tunepool.training": [1]}, "match pattern"),
    ],
)
def test_a_parameter_that_says_nothing_clear_is_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep(parameters)


@pytest.mark.parametrize(
    "parameters", [{"tunepool.queue.tier": ["normal"]}, {"tunepool.a.b": [1], "tunepool.a.b.c": [1]}]
)
def test_what_cannot_be_swept_is_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as refused:
        sweep(parameters)
    assert refused.value.param == f"parameters.{next(iter(parameters))}"


# --- halving ----------------------------------------------------------------------------------------------------------


@given(trials=st.integers(1, MAX_TRIALS), factor=st.integers(2, 10), first=st.integers(1, 1000))
def test_rungs_are_the_first_step_times_powers_of_the_factor_until_one_trial_is_left(
    trials: int, factor: int, first: int
) -> None:
    steps = halving.rung_steps(trials, factor, first)

    assert factor ** len(steps) <= trials < factor ** (len(steps) + 1)
    assert list(steps) == [first * factor**number for number in range(len(steps))]
    assert max(1, trials // factor ** len(steps)) < factor


VALUES = st.dictionaries(
    st.integers(0, 40), st.one_of(st.none(), st.floats(allow_infinity=False)), min_size=1, max_size=41
)


@given(values=VALUES, factor=st.integers(2, 5), missing=st.integers(0, 9), lower=st.booleans())
def test_the_best_part_of_those_that_entered_goes_on_and_no_loser_is_better_than_a_winner(
    values: dict[int, float | None], factor: int, missing: int, lower: bool
) -> None:
    entered = len(values) + missing
    judged = halving.verdicts(values, entered=entered, factor=factor, lower_is_better=lower)

    winners = [number for number, verdict in judged.items() if verdict.goes_on]
    losers = [number for number, verdict in judged.items() if not verdict.goes_on]
    assert len(winners) == min(len(values), max(1, entered // factor))
    assert sorted(verdict.rank for verdict in judged.values()) == list(range(1, len(values) + 1))
    for winner in winners:
        for loser in losers:
            assert (_badness(values[winner], lower), winner) < (_badness(values[loser], lower), loser)


def _badness(value: float | None, lower: bool) -> float:
    if value is None or math.isnan(value):
        return math.inf
    return value if lower else -value


@given(losses=st.lists(st.floats(0, 10), min_size=2, max_size=81, unique=True), factor=st.integers(2, 4))
def test_losses_that_keep_their_order_lead_to_the_best_trial_as_the_paper_promises(
    losses: list[float], factor: int
) -> None:
    left = dict(enumerate(losses))
    for rung in range(halving.rung_count(len(losses), factor)):
        judged = halving.verdicts(left, entered=len(losses) // factor**rung, factor=factor, lower_is_better=True)
        left = {number: value for number, value in left.items() if judged[number].goes_on}
        assert len(left) == len(losses) // factor ** (rung + 1)

    assert min(left.values()) == min(losses)
    assert len(left) < factor
