"""The events of a job, numbered without gaps: callers hold the job's row lock, so no two number at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.contract.events import Level
from shared.ids import new_id
from shared.store.json_text import held_text, written


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What a client will read: `type` is OpenAI's, `message` a sentence, `data` figures."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


# Numbers are found by the statement that uses them: however many events of however many jobs, one round trip.
_APPEND: Final = text("""
    insert into events (job_id, seq, id, level, type, message, data)
    select new.job_id,
           coalesce((select max(seq) from events where job_id = new.job_id), 0)
               + row_number() over (partition by new.job_id order by new.place),
           new.id, new.level, new.type, new.message, new.data::jsonb
    from unnest(cast(:job_id as text[]), cast(:id as text[]), cast(:level as text[]), cast(:type as text[]),
                cast(:message as text[]), cast(:data as text[]))
         with ordinality as new (job_id, id, level, type, message, data, place)
""")

# The first events of a job that the same statement stores, as its part `job`: numbered as they stand.
OF_NEW_JOB: Final = """
    insert into events (job_id, seq, id, level, type, message, data)
    select job.id, new.place, new.event->>'id', new.event->>'level', new.event->>'type', new.event->>'message',
           nullif(new.event->'data', 'null')
    from job, jsonb_array_elements(cast(:first_events as jsonb)) with ordinality as new (event, place)
"""


def of_new_job(events: Sequence[NewEvent]) -> dict[str, str]:
    """The value of `OF_NEW_JOB`."""
    rows = [
        {
            "id": new_id("ftevent-"),
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": event.data,
        }
        for event in events
    ]
    return {"first_events": written(rows)}


def append(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Number and store `events` behind those the job has."""
    _store(session, [(job_id, event) for event in events])


def append_to_each(session: Session, job_ids: Collection[str], event: NewEvent) -> None:
    """Store one event behind those of every job."""
    _store(session, [(job_id, event) for job_id in job_ids])


def _store(session: Session, events: Collection[tuple[str, NewEvent]]) -> None:
    if events:
        rows = [_row(job_id, event) for job_id, event in events]
        session.execute(_APPEND, {name: [row[name] for row in rows] for name in rows[0]})


def _row(job_id: str, event: NewEvent) -> dict[str, str | None]:
    return {
        "job_id": job_id,
        "id": new_id("ftevent-"),
        "level": event.level,
        "type": event.type,
        "message": held_text(event.message),
        "data": None if event.data is None else written(event.data),
    }
