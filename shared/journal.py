"""The events of a job, numbered without gaps: callers hold the job's row lock, so no two number at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import bindparam, text
from sqlalchemy.orm import Session

from shared.events import Level
from shared.ids import new_id
from shared.tables import Json


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What a client will read: `type` is OpenAI's, `message` a sentence, `data` figures."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


# The number is found by the statement that uses it: however many events, one round trip.
_APPEND = text("""
    insert into events (job_id, seq, id, level, type, message, data)
    select :job_id, coalesce(max(seq), 0) + 1, :id, :level, :type, :message, :data from events where job_id = :job_id
""").bindparams(bindparam("data", type_=Json))


def append(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Number and store `events` behind those the job has."""
    if events:
        session.execute(_APPEND, [_row(job_id, event) for event in events])


def append_to_each(session: Session, job_ids: Collection[str], event: NewEvent) -> None:
    """Store one event behind those of every job, in one round trip however many they are."""
    if job_ids:
        session.execute(_APPEND, [_row(job_id, event) for job_id in job_ids])


def _row(job_id: str, event: NewEvent) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "id": new_id("ftevent-"),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }
