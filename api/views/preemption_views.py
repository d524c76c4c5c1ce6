"""Views of attempts that give their devices away."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.operating.overview import Overview
from shared.tenants.keys import Caller


class PoolPreemption(View):
    """An attempt that gives its devices away, or gave them away within the last day."""

    job_id: str | None = Field(description="null: another project's.")
    project_id: str | None
    attempt: int | None = Field(description="null while it still saves its checkpoint.")
    reason: Literal["queue", "drain"] = Field(description="queue: for another job; drain: its worker shut down.")
    ended_at: int | None = Field(description="null: it was asked to, and still saves its checkpoint.")


def preemptions(overview: Overview, *, caller: Caller) -> list[PoolPreemption]:
    under_way = [
        PoolPreemption(job_id=job_id, project_id=job.project, attempt=None, reason="queue", ended_at=None)
        for job_id, job in overview.running.items()
        if job.preempt_requested
    ]
    past = [
        PoolPreemption(
            job_id=each.job_id,
            project_id=each.project_id,
            attempt=each.attempt,
            reason="queue" if each.outcome == "preempted" else "drain",
            ended_at=seconds(each.ended_at),
        )
        for each in overview.preemptions
    ]
    unnamed = {"job_id": None, "project_id": None}
    return [
        each if caller.operates or each.project_id == caller.project_id else each.model_copy(update=unnamed)
        for each in (*under_way, *past)
    ]
