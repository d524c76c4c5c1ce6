"""The place of a queued job: why it waits, and when it may start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pydantic import Field

from api.plan_cache import PlanCache, PlannedPlace
from api.views.view import View, maybe_seconds, seconds
from shared.plan.verdicts import Verdict
from shared.store.tables import AttemptRow, JobRow


class QueueState(View):
    """Why a job waits, and what would unblock it. CLUSTER: admitted, and a cluster has yet to start it."""

    position: int | None = Field(description="1-based place in the effective order of the pool.")
    jobs_ahead: int | None
    blocked_by: str | None = Field(examples=["NO_FREE_DEVICE"])
    detail: str
    eta_low: int | None = Field(default=None, description="Start at best; jobs still to come may delay it.")
    eta_high: int | None = Field(default=None, description="Start at worst, as far as running jobs have limits.")
    first_eta_low: int | None = Field(default=None, description="The first forecast that was made.")
    first_eta_high: int | None = None
    drift_seconds: int | None = Field(
        default=None, description="How much later than first forecast it starts by now (earlier: negative)."
    )
    as_of: int = Field(description="When the plan was made that says so; a plan serves all for about a second.")


def queue_state(look: PlannedPlace, row: JobRow) -> QueueState:
    """What the latest plan says of a queued job."""
    verdict = look.verdict
    state = QueueState(
        position=None,
        jobs_ahead=None,
        blocked_by=None,
        detail="Queued a moment ago; its place in the queue is known with the next plan.",
        first_eta_low=maybe_seconds(row.first_eta_low),
        first_eta_high=maybe_seconds(row.first_eta_high),
        as_of=seconds(look.as_of),
    )
    if look.starting:
        starting = "A device is free; a worker is about to start this job."
        return state.model_copy(update={"position": 1, "jobs_ahead": 0, "detail": starting})
    if verdict is None:
        return state
    return state.model_copy(
        update={
            "position": verdict.position,
            "jobs_ahead": verdict.jobs_ahead,
            "blocked_by": verdict.blocked_by,
            "detail": verdict.detail,
            "eta_low": maybe_seconds(verdict.eta_low),
            "eta_high": maybe_seconds(verdict.eta_high),
            "drift_seconds": _drift(verdict, row),
        }
    )


def place(row: JobRow, outlook: PlanCache) -> QueueState | None:
    """Where a job of a list waits. What a cluster says of one stands with its attempts, which lists leave out."""
    return queue_state(outlook.of(row.id), row) if row.status == "queued" else None


def cluster_state(row: JobRow, attempts: Sequence[AttemptRow]) -> QueueState | None:
    """A cluster's words about a job that waits there for a machine; None where the job waits in no cluster."""
    latest = attempts[-1] if attempts else None
    if row.status != "running" or latest is None or latest.ended_at is not None or latest.phase != "submitted":
        return None
    return QueueState(
        position=None,
        jobs_ahead=None,
        blocked_by="CLUSTER",
        detail=(latest.cluster or {}).get("words", "A device is its own; the cluster is about to be asked for it."),
        first_eta_low=maybe_seconds(row.first_eta_low),
        first_eta_high=maybe_seconds(row.first_eta_high),
        as_of=seconds(latest.started_at),
    )


def _drift(verdict: Verdict, row: JobRow) -> int | None:
    """The drift of the worst case where both forecasts have one, else of the best case."""
    for now, first in ((verdict.eta_high, row.first_eta_high), (verdict.eta_low, row.first_eta_low)):
        if now is not None and first is not None:
            return round((now - first).total_seconds())
    return None


def etag(version: int, look: PlannedPlace | None) -> str:
    """The ETag of a job: its row's version and its place. Forecasts count in whole minutes, for they slide."""
    if look is None:
        return f'"{version}"'
    parts, verdict = [str(look.starting)], look.verdict
    if verdict is not None:
        minutes = [moment and int(moment.timestamp()) // 60 for moment in (verdict.eta_low, verdict.eta_high)]
        parts += [repr((verdict.position, verdict.jobs_ahead, verdict.blocked_by, verdict.detail, minutes))]
    return f'"{version}-{hashlib.sha256("".join(parts).encode()).hexdigest()[:16]}"'
