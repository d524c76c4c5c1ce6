"""Views of sweeps and of their trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.chores import sweep_looks
from shared.chores.sweeps import SeenSweep
from shared.contract.documents import JobError
from shared.contract.sweep import CreateSweep, LookMeasure, SweepStatus, TrialState, lower_is_better
from shared.store.lifecycle import JobStatus
from shared.store.tables import SweepRow, TrialRow


class TrialView(View):
    """One setting of a sweep."""

    number: int
    state: TrialState = Field(description="stopped: by the sweep; `reason` says why.")
    parameters: dict[str, Any]
    job: str | None
    job_status: JobStatus | None
    model: str | None = Field(description="What it has made.")
    value: float | None = Field(description="Its best value so far; once it has ended, the one it is chosen by.")
    step: int | None
    rung: int = Field(description="Comparisons that it has passed.")
    looks: list[tuple[int, float | None]] = Field(description="Step and value of each look at the validation file.")
    device_seconds: float
    reason: str | None
    error: JobError | None


class SweepHead(View):
    """A sweep without its trials."""

    id: str = Field(examples=["sweep_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.sweep"] = "tunepool.sweep"
    status: SweepStatus
    name: str | None
    strategy: Literal["grid", "random", "halving"]
    measure: LookMeasure
    better: Literal["lower", "higher"]
    trial_counts: dict[TrialState, int]
    best: int | None = Field(description="Number of the best trial; null until the sweep has succeeded.")
    metadata: dict[str, str]
    created_at: int
    finished_at: int | None
    closed: str | None = Field(description="Why nothing is started any more.")
    detail: str | None = Field(description="Why the next trial is not started yet, or which trial somebody has paused.")
    error: JobError | None


class SweepView(SweepHead):
    """One job in many settings."""

    request: CreateSweep
    rungs: list[int] = Field(description="Steps at which trials are compared; empty without halving.")
    device_seconds: float
    trials: list[TrialView]


class SweepPage(View):
    object: Literal["list"] = "list"
    data: list[SweepHead]
    has_more: bool


def head(row: SweepRow, counts: Mapping[str, int]) -> SweepHead:
    return SweepHead(**_head(row, CreateSweep.model_validate(row.request), counts))


def _head(row: SweepRow, request: CreateSweep, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": row.id,
        "status": row.status,
        "name": request.name,
        "strategy": request.strategy.type,
        "measure": request.measure,
        "better": "lower" if lower_is_better(request.measure) else "higher",
        "trial_counts": dict(counts),
        "best": row.best,
        "metadata": request.metadata,
        "created_at": seconds(row.created_at),
        "finished_at": maybe_seconds(row.finished_at),
        "closed": row.closed,
        "detail": row.detail,
        "error": None if row.error is None else JobError.model_validate(row.error),
    }


def sweep(seen: SeenSweep) -> SweepView:
    request = CreateSweep.model_validate(seen.row.request)
    counts: dict[str, int] = {}
    for row in seen.trials:
        counts[row.state] = counts.get(row.state, 0) + 1
    return SweepView(
        **_head(seen.row, request, counts),
        request=request,
        rungs=list(sweep_looks.rungs_of(request, len(seen.trials))),
        device_seconds=round(sum(seen.seconds.values()), 3),
        trials=[_trial(row, seen, request) for row in seen.trials],
    )


def _trial(row: TrialRow, seen: SeenSweep, request: CreateSweep) -> TrialView:
    job = None if row.job_id is None else seen.jobs[row.job_id]
    return TrialView(
        number=row.number,
        state=row.state,
        parameters=row.settings,
        job=row.job_id,
        job_status=None if job is None else job.status,
        model=None if job is None else job.fine_tuned_model,
        value=sweep_looks.best(row, request),
        step=None if job is None else (job.progress or {}).get("step"),
        rung=row.rung,
        looks=[(step, value) for step, value, _full in row.looks],
        device_seconds=0.0 if job is None else round(seen.seconds[job.id], 3),
        reason=row.reason,
        error=None if row.error is None else JobError.model_validate(row.error),
    )
