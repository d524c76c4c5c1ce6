"""The events of a job, numbered without gaps: callers hold the job's row lock, so no two number at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from shared.events import Level
from shared.ids import new_id
from shared.tables import EventRow


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What a client will read: `type` is OpenAI's, `message` a sentence, `data` figures."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


def append(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Number and store `events` behind those the job has."""
    if not events:
        return
    last: int = session.scalar(select(func.coalesce(func.max(EventRow.seq), 0)).where(EventRow.job_id == job_id)) or 0
    session.execute(
        insert(EventRow), [_row(job_id, last + offset, event) for offset, event in enumerate(events, start=1)]
    )


def append_to_each(session: Session, job_ids: Collection[str], event: NewEvent) -> None:
    """Store one event behind those of every job, in two statements however many they are."""
    if not job_ids:
        return
    last = dict(
        session.execute(
            select(EventRow.job_id, func.max(EventRow.seq))
            .where(EventRow.job_id.in_(job_ids))
            .group_by(EventRow.job_id)
        ).all()
    )
    session.execute(insert(EventRow), [_row(job_id, last.get(job_id, 0) + 1, event) for job_id in job_ids])


def _row(job_id: str, seq: int, event: NewEvent) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "seq": seq,
        "id": new_id("ftevent-"),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }
