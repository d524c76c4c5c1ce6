"""Views of a job's events and checkpoints in OpenAI's form."""

from __future__ import annotations

from typing import Any, Literal

from api.views.view import View, seconds
from shared.store.tables import CheckpointRow, EventRow


class Event(View):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventPage(View):
    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool


class Checkpoint(View):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class CheckpointPage(View):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def event(row: EventRow) -> Event:
    return Event.model_validate(
        {
            "id": row.id,
            "created_at": seconds(row.created_at),
            "level": row.level,
            "message": row.message,
            "type": row.type,
            "data": row.data,
        }
    )


def checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        id=row.id,
        created_at=seconds(row.created_at),
        fine_tuned_model_checkpoint=row.name,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        metrics=row.metrics,
    )
