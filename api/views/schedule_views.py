"""Views of schedules and of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.contract.schedule import Overlap
from shared.store.tables import ScheduleRow, ScheduleRunRow


class ScheduleRun(View):
    """One due moment and what came of it."""

    id: str = Field(examples=["srun_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.schedule_run"] = "tunepool.schedule_run"
    due_at: int
    cause: Literal["cron", "change", "by_hand"]
    verdict: Literal["started", "skipped", "refused"]
    code: str | None = Field(description="Of a refusal: the submission's. Of what is skipped: `unchanged`, `overlap`.")
    reason: str
    missed: int = Field(description="Earlier moments that nobody was there for; this run stands for them.")
    job_id: str | None
    job_status: str | None = Field(description="Now.")
    created_at: int


class JobSchedule(View):
    id: str = Field(examples=["sched_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.schedule"] = "tunepool.schedule"
    name: str
    cron: str | None
    time_zone: str
    data_prefix: str | None
    overlap: Overlap
    skip_unchanged: bool
    job: dict[str, Any]
    key_id: str = Field(description="With whose rights its jobs are submitted.")
    paused_at: int | None = Field(description="Null: it is active.")
    next_at: int | None = Field(description="Null: paused, or it waits for data.")
    created_at: int
    last_runs: list[ScheduleRun] = Field(description="Newest first; one in lists, at most ten of a single schedule.")


class SchedulePage(View):
    object: Literal["list"] = "list"
    data: list[JobSchedule]
    has_more: bool


class ScheduleRunPage(View):
    object: Literal["list"] = "list"
    data: list[ScheduleRun]
    has_more: bool


def run(row: ScheduleRunRow, job_status: str | None) -> ScheduleRun:
    return ScheduleRun.model_validate(
        {
            "id": row.id,
            "due_at": seconds(row.due_at),
            "cause": row.cause,
            "verdict": row.verdict,
            "code": row.code,
            "reason": row.reason,
            "missed": row.missed,
            "job_id": row.job_id,
            "job_status": job_status,
            "created_at": seconds(row.created_at),
        }
    )


def schedule(row: ScheduleRow, runs: Sequence[tuple[ScheduleRunRow, str | None]]) -> JobSchedule:
    return JobSchedule.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "cron": row.cron,
            "time_zone": row.time_zone,
            "data_prefix": row.data_prefix,
            "overlap": row.overlap,
            "skip_unchanged": row.skip_unchanged,
            "job": row.request,
            "key_id": row.key_id,
            "paused_at": maybe_seconds(row.paused_at),
            "next_at": maybe_seconds(row.next_at),
            "created_at": seconds(row.created_at),
            "last_runs": [run(past, status) for past, status in runs],
        }
    )
