"""From a sweep to its trials: which values each takes, and the body of its job. Pure, and the same at every call.

A drawn value depends on the sweep's seed, the trial's number and the field's name alone: more trials or another
parameter leave the others as they are. Ranges are drawn as Optuna's `suggest_float` and `suggest_int` do.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any, Final

from shared.contract.job_request import chosen as settled
from shared.contract.spec import DEFAULT_OBJECTIVE, Evaluation
from shared.contract.sweep import MAX_TRIALS, CreateSweep, Grid, Halving, Parameter, RandomSearch
from shared.errors import Invalid

SWEEP_LABEL: Final = "tunepool_sweep"
TRIAL_LABEL: Final = "tunepool_trial"
LABELS_OF_JOB: Final = 14  # two more are the sweep's
_DIGITS: Final = 6  # of a drawn number: 0.00023712, as people write them


def settings(wanted: CreateSweep) -> list[dict[str, Any]]:
    """Field -> value of each trial, in order. Raises Invalid for too many, and for a range without points in a grid."""
    match wanted.strategy:
        case RandomSearch(trials=int(count)) | Halving(trials=int(count)):
            return [_drawn(wanted, number) for number in range(count)]
        case Grid() | Halving():
            return _grid(wanted)


def check(wanted: CreateSweep) -> None:
    """What must hold for every trial, whatever its values. Raises Invalid."""
    job = wanted.job
    if job.validation_file is None:
        raise Invalid(
            f"'job.validation_file' is missing: trials are compared by '{wanted.measure}', which is measured on it.",
            param="job.validation_file",
        )
    queue = job.tunepool.queue
    for name in ("group", "supersede"):
        if queue is not None and getattr(queue, name):
            raise Invalid(
                f"'job.tunepool.queue.{name}' is set, but a sweep's trials are a group of their own; leave it out.",
                param=f"job.tunepool.queue.{name}",
            )
    if len(job.metadata or {}) > LABELS_OF_JOB:
        raise Invalid(
            f"'job.metadata' has {len(job.metadata or {})} entries; two of 16 are the sweep's. Leave some out.",
            param="job.metadata",
        )
    _check_measure(wanted)


def _check_measure(wanted: CreateSweep) -> None:
    """Answers are measured where the job asks for them. Raises Invalid."""
    if wanted.measure.startswith("valid_"):
        return
    looks: Evaluation | None = settled(wanted.job.tunepool.training).get("eval")
    asked = [] if looks is None or looks.generate is None else looks.generate.measures
    if wanted.measure not in asked:
        raise Invalid(
            f"'measure' is {wanted.measure}, which the trials would not measure; name it in "
            "job.tunepool.training.eval.generate.measures.",
            param="measure",
        )


def _grid(wanted: CreateSweep) -> list[dict[str, Any]]:
    axes = [_axis(name, parameter) for name, parameter in wanted.parameters.items()]
    count = math.prod(len(axis) for axis in axes)
    if count > MAX_TRIALS:
        raise Invalid(
            f"The grid has {count} trials; a sweep has at most {MAX_TRIALS}. Name fewer values, or draw random ones.",
            param="parameters",
            code="sweep_too_large",
        )
    return [dict(zip(wanted.parameters, values, strict=True)) for values in itertools.product(*axes)]


def _axis(name: str, parameter: Parameter) -> list[Any]:
    if parameter.values is not None:
        return parameter.values
    if parameter.points is None:
        raise Invalid(
            f"'parameters.{name}' is a range, but a grid tries single values; give it points, or values.",
            param=f"parameters.{name}",
        )
    shares = (place / (parameter.points - 1) for place in range(parameter.points))
    return list(dict.fromkeys(_within(parameter, share) for share in shares))


def _drawn(wanted: CreateSweep, number: int) -> dict[str, Any]:
    return {
        name: _draw(parameter, random.Random(f"{wanted.seed}/{number}/{name}").random())  # noqa: S311  # repeatable
        for name, parameter in wanted.parameters.items()
    }


def _draw(parameter: Parameter, share: float) -> Any:
    """The value at `share` (0 <= share < 1) of what the field takes."""
    if parameter.values is not None:
        return parameter.values[int(share * len(parameter.values))]
    return _within(parameter, share, widened=True)


def _within(parameter: Parameter, share: float, *, widened: bool = False) -> int | float:
    """The number at `share` of a range. `widened`: each whole number has an equal part, the two at the ends, too."""
    low, high = parameter.min, parameter.max
    assert low is not None
    assert high is not None
    whole = isinstance(low, int) and isinstance(high, int)
    margin = 0.5 if whole and widened else 0.0
    start, end = low - margin, high + margin
    if parameter.scale == "log":
        value = math.exp(math.log(start) + share * (math.log(end) - math.log(start)))
    else:
        value = start + share * (end - start)
    rounded = round(value) if whole else float(f"{value:.{_DIGITS}g}")
    return min(max(rounded, low), high)


def body(wanted: CreateSweep, sweep_id: str, number: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """The body of a trial's job, as a client would post it. Raises Invalid where a field is within a value."""
    made: dict[str, Any] = wanted.job.model_dump(mode="json", exclude_unset=True)
    made["seed"] = wanted.seed if made.get("seed") is None else made["seed"]
    for name, value in chosen.items():
        _put(made, _path(made, name), value, name)
    if isinstance(wanted.strategy, Halving):
        _look_at_rungs(made, wanted.strategy)
    _put(made, ["tunepool", "queue", "group"], sweep_id, "job.tunepool.queue.group")
    made["metadata"] = {**(made.get("metadata") or {}), SWEEP_LABEL: sweep_id, TRIAL_LABEL: str(number)}
    return made


def _path(made: dict[str, Any], name: str) -> list[str]:
    head, *rest = name.split(".")
    if head != "hyperparameters":
        return [head, *rest]
    objective = (made.get("method") or {}).get("type", DEFAULT_OBJECTIVE)
    made["method"] = {"type": objective, **(made.get("method") or {})}
    return ["method", objective, "hyperparameters", *rest]


def _put(made: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    *way, last = path
    place = made
    for step in way:
        if place.get(step) is None:
            place[step] = {}
        place = place[step]
        if not isinstance(place, dict):
            shown = json.dumps(place)[:80]
            raise Invalid(f"'{name}' cannot be set: the job says {shown} for '{step}'; leave that out.", param=name)
    place[last] = json.loads(json.dumps(value))  # its own copy: the trials share no list


def _look_at_rungs(made: dict[str, Any], strategy: Halving) -> None:
    """Have the validation file looked at where trials are compared: every rung is a multiple of the first."""
    looks = ((made.get("tunepool") or {}).get("training") or {}).get("eval") or {}
    steps = looks.get("steps")
    if steps is None:
        _put(made, ["tunepool", "training", "eval", "steps"], strategy.first_step, "tunepool.training.eval")
    elif not isinstance(steps, int) or strategy.first_step % steps:
        raise Invalid(
            f"'tunepool.training.eval.steps' is {steps}, but trials are compared at step {strategy.first_step}; "
            "leave it out, or give a divisor of strategy.first_step.",
            param="job.tunepool.training.eval.steps",
        )


def labels(chosen: dict[str, Any]) -> Iterator[str]:
    """`learning_rate=0.001` of each field, for people."""
    for name, value in chosen.items():
        yield f"{name.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}"
