"""The looks at the validation file of a sweep's jobs: read from their events, kept with the trials, compared.

A look is `[step, value, full]`: `value` is null where the measure was not taken, `full` where every row was read.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ARRAY, BigInteger, Text, cast, func, select
from sqlalchemy.orm import Session

from shared.chores.sweeps import SeenSweep
from shared.contract.sweep import CreateSweep, Halving, event_key, lower_is_better
from shared.plan import halving
from shared.store.tables import EventRow, JobRow, TrialRow

KEPT: Final = 200  # looks of a trial; of more, every second one goes
Look = list[Any]


def read(session: Session, seen: SeenSweep, wanted: CreateSweep) -> None:
    """Add the looks since the last round to the trials at work."""
    watched = {trial.job_id: trial for trial in seen.trials if trial.state == "started" and trial.job_id is not None}
    if not watched:
        return
    known = select(
        func.unnest(cast(list(watched), ARRAY(Text))).label("job_id"),
        func.unnest(cast([trial.seen for trial in watched.values()], ARRAY(BigInteger))).label("seq"),
    ).subquery()
    rows = session.execute(
        select(EventRow.job_id, EventRow.seq, EventRow.data)
        .join(known, (EventRow.job_id == known.c.job_id) & (EventRow.seq > known.c.seq))
        .where(EventRow.type == "metrics", EventRow.data.has_key("valid_loss"))
        .order_by(EventRow.job_id, EventRow.seq)
    )
    rungs = rungs_of(wanted, len(seen.trials))
    for job_id, seq, data in rows:
        trial = watched[job_id]
        trial.seen = seq
        trial.looks = _added(trial.looks, data, event_key(wanted.measure), rungs)


def rungs_of(wanted: CreateSweep, trials: int) -> tuple[int, ...]:
    """Steps at which trials are compared; none without halving."""
    strategy = wanted.strategy
    if not isinstance(strategy, Halving):
        return ()
    return halving.rung_steps(trials, strategy.factor, strategy.first_step)


def _added(looks: list[Look], data: dict[str, Any], key: str, rungs: tuple[int, ...]) -> list[Look]:
    """A new list. A step that an attempt comes to again keeps its first value; a full look is one of its own."""
    look = [data["step"], data.get(key), bool(data.get("full"))]
    if any(known[0] == look[0] and known[2] == look[2] for known in looks):
        return looks
    if len(looks) >= KEPT:
        looks = [known for place, known in enumerate(looks) if place % 2 == 0 or known[0] in rungs or known[2]]
    return [*looks, look]


def at(looks: list[Look], job: JobRow, step: int) -> list[float | None]:
    """The value at `step`, in a list; an empty one: the job has not come so far.

    A job that has ended before has its last value there, and one that has passed without a look has none.
    """
    for known in sorted((known for known in looks if known[0] == step), key=lambda known: bool(known[2])):
        return [known[1]]  # the look of every trial there, rather than a full one
    if job.status == "succeeded":
        return [looks[-1][1] if looks else None]
    return [None] if (job.progress or {}).get("step", 0) > step else []


def final(looks: list[Look], job: JobRow, wanted: CreateSweep) -> float | None:
    """By which the trial is chosen: the value of the checkpoint that its job publishes, as near as looks tell.

    Where every validation row was read at times, only those looks count.
    """
    full = [known[1] for known in looks if known[2] and known[1] is not None]
    values = full or [known[1] for known in looks if known[1] is not None]
    if not values:
        return None
    if ((job.spec or {}).get("training") or {}).get("publish") == "last":
        return float(values[-1])
    return float(min(values) if lower_is_better(wanted.measure) else max(values))


def best(trial: TrialRow, wanted: CreateSweep) -> float | None:
    """The best value so far; that of an ended one is settled."""
    values = [known[1] for known in trial.looks if known[1] is not None]
    if trial.value is not None or not values:
        return trial.value
    return float(min(values) if lower_is_better(wanted.measure) else max(values))
