"""Reads jobs and lists for the doors. Pages use a keyset: any depth costs the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import BigInteger, Select, Text, cast, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session, aliased

from shared.errors import NotFound
from shared.store import paging
from shared.store.lifecycle import UNFINISHED
from shared.store.tables import AttemptRow, CheckpointRow, DeviceRow, EventRow, JobLabelRow, JobRow


def job(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """A job of this project. Raises NotFound: another project's job does not exist for the caller."""
    row = session.get(JobRow, job_id)
    if row is None or row.project_id != project_id:
        raise _not_found(job_id)
    return row


def several(session: Session, job_ids: Sequence[str], *, project_id: str) -> Sequence[JobRow]:
    """Those of the jobs that are this project's, in the order of `job_ids`; of others nothing is said."""
    rows = session.scalars(select(JobRow).where(JobRow.id.in_(job_ids), JobRow.project_id == project_id)).all()
    return sorted(rows, key=lambda row: job_ids.index(row.id))


def job_version(session: Session, job_id: str, *, project_id: str) -> tuple[int, str]:
    """Version and status of a job, for a poll. Raises NotFound like `job`."""
    known = session.execute(
        select(JobRow.version, JobRow.status).where(JobRow.id == job_id, JobRow.project_id == project_id)
    ).one_or_none()
    if known is None:
        raise _not_found(job_id)
    return known.version, known.status


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"Could not find fine tune: {job_id[:100]}", param="fine_tuning_job_id")


def jobs(
    session: Session,
    *,
    project_id: str,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None,
    without_metadata: bool,
    status: str | None = None,
    model: str | None = None,
    group: str | None = None,
) -> tuple[Sequence[JobRow], bool]:
    """Newest first, and whether more follow. `model`: the base as it was named, or its own name.

    Raises NotFound for an `after` that is no job of the project.
    """
    query, mine = select(JobRow), JobRow.project_id == project_id
    if status is not None:
        query = query.where(JobRow.status == status)
    if model is not None:
        query = query.where((JobRow.model == model) | (JobRow.base_model == model))
    if group is not None:
        query = query.where(JobRow.group_name == group)
    if without_metadata:
        query = query.where(JobRow.job_metadata.is_(None))
    for pair in (metadata or {}).items():
        query = _labelled(query, pair, project_id, after)
    return paging.page(session, query, JobRow.id, mine, after=after, limit=limit, what="job")


def _labelled(query: Select[JobRow], pair: tuple[str, str], project_id: str, after: str | None) -> Select[JobRow]:
    """The jobs with this pair in their metadata. Labels lie in the order of the list, so a page reads its own rows.

    An index over whole metadata would give all jobs with the pair, each at a place of its own, to be sorted afterwards.
    """
    label = aliased(JobLabelRow)
    query = query.join(label, label.job_id == JobRow.id).where(
        label.project_id == project_id,
        label.label == func.metadata_label(*pair),
        JobRow.job_metadata[pair[0]].as_string() == pair[1],  # two pairs may have one hash
    )
    # Postgres carries no bound from one joined column to the other by itself.
    return query if after is None else query.where(label.job_id < after)


def events(session: Session, job_id: str, *, after: str | None, limit: int) -> tuple[Sequence[EventRow], bool]:
    """Newest first, and whether more follow. An unknown `after` raises NotFound."""
    query = select(EventRow).where(EventRow.job_id == job_id)
    if after is not None:
        seq = session.scalar(select(EventRow.seq).where(EventRow.id == after, EventRow.job_id == job_id))
        if seq is None:
            raise NotFound(f"No event '{after[:100]}' in this job.", param="after")
        query = query.where(EventRow.seq < seq)
    return paging.cut(session.scalars(query.order_by(EventRow.seq.desc()).limit(limit + 1)).all(), limit)


def events_behind(session: Session, job_id: str, *, seq: int, limit: int) -> Sequence[EventRow]:
    """Oldest first, from the event that follows number `seq`."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > seq)
    return session.scalars(query.order_by(EventRow.seq).limit(limit)).all()


def newest_event(session: Session, job_id: str) -> int:
    """The number of the job's newest event; 0 when it has none."""
    return session.scalar(select(func.max(EventRow.seq)).where(EventRow.job_id == job_id)) or 0


class JobUpdate(NamedTuple):
    """A job's status and its new events, as one query finds them."""

    status: str
    events: list[EventRow]  # oldest first


def news(session: Session, watched: Mapping[str, int], *, limit: int) -> dict[str, JobUpdate]:
    """Status and newest events (at most `limit`) of each job, after the event number that is known.

    One statement, so one snapshot: with a final status come all events of the job.
    """
    known = select(
        func.unnest(cast(list(watched), ARRAY(Text))).label("job_id"),
        func.unnest(cast(list(watched.values()), ARRAY(BigInteger))).label("seq"),
    ).subquery()
    behind = (
        select(EventRow)
        .where(EventRow.job_id == known.c.job_id, EventRow.seq > known.c.seq)
        .order_by(EventRow.seq.desc())
        .limit(limit)
        .lateral()
    )
    event = aliased(EventRow, behind)
    by_job: dict[str, JobUpdate] = {}
    rows = session.execute(
        select(JobRow.id, JobRow.status, event)
        .join(known, known.c.job_id == JobRow.id)
        .join(event, true(), isouter=True)
        .order_by(JobRow.id, event.seq)
    )
    for job_id, status, row in rows:
        of_job = by_job.setdefault(job_id, JobUpdate(status, []))
        if row is not None:
            of_job.events.append(row)
    return by_job


def checkpoints(
    session: Session, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[CheckpointRow], bool]:
    """Newest first, and whether more follow. An unknown `after` raises NotFound."""
    of_job = CheckpointRow.job_id == job_id
    return paging.page(
        session, select(CheckpointRow), CheckpointRow.id, of_job, after=after, limit=limit, what="checkpoint"
    )


def attempts(session: Session, job_id: str) -> Sequence[AttemptRow]:
    return session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)).all()


def devices(session: Session, *, pool_name: str) -> Sequence[DeviceRow]:
    """Every device that a worker of the pool has reported, also of workers that are silent now."""
    return session.scalars(select(DeviceRow).where(DeviceRow.pool == pool_name).order_by(DeviceRow.id)).all()


def unfinished(session: Session) -> dict[str, int]:
    """How many jobs, of all projects, stand in each state that is not final."""
    counted = session.execute(
        select(JobRow.status, func.count()).where(JobRow.status.in_(sorted(UNFINISHED))).group_by(JobRow.status)
    )
    return {row.status: row[1] for row in counted}
