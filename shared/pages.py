"""What doors list. Pages go by keyset: any depth costs the same, and `after` may name what is gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.errors import NotFound
from shared.lifecycle import TERMINAL
from shared.tables import AttemptRow, CheckpointRow, DeviceRow, EventRow, JobRow


def job(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """A job of this project. Raises NotFound: another project's job does not exist for the caller."""
    row = session.get(JobRow, job_id)
    if row is None or row.project_id != project_id:
        raise NotFound(f"Could not find fine tune: {job_id[:100]}", param="fine_tuning_job_id")
    return row


def jobs(
    session: Session,
    *,
    project_id: str,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None,
    without_metadata: bool,
) -> tuple[Sequence[JobRow], bool]:
    """Newest first, and whether more follow."""
    query = select(JobRow).where(JobRow.project_id == project_id)
    if after is not None:
        query = query.where(JobRow.id < after)
    if metadata:
        query = query.where(JobRow.job_metadata.contains(metadata))
    if without_metadata:
        query = query.where(JobRow.job_metadata.is_(None))
    rows = session.scalars(query.order_by(JobRow.id.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def events(session: Session, job_id: str, *, after: str | None, limit: int) -> tuple[Sequence[EventRow], bool]:
    """Newest first, and whether more follow. An unknown `after` raises NotFound."""
    query = select(EventRow).where(EventRow.job_id == job_id)
    if after is not None:
        seq = session.scalar(select(EventRow.seq).where(EventRow.id == after, EventRow.job_id == job_id))
        if seq is None:
            raise NotFound(f"No event '{after[:100]}' in this job.", param="after")
        query = query.where(EventRow.seq < seq)
    rows = session.scalars(query.order_by(EventRow.seq.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def checkpoints(
    session: Session, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[CheckpointRow], bool]:
    """Newest first, and whether more follow."""
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
    if after is not None:
        query = query.where(CheckpointRow.id < after)
    rows = session.scalars(query.order_by(CheckpointRow.id.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def attempts(session: Session, job_id: str) -> Sequence[AttemptRow]:
    return session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)).all()


def devices(session: Session, *, pool_name: str) -> Sequence[DeviceRow]:
    """Every device that a worker of the pool has reported, also of workers that are silent now."""
    return session.scalars(select(DeviceRow).where(DeviceRow.pool == pool_name).order_by(DeviceRow.id)).all()


def unfinished(session: Session) -> dict[str, int]:
    """How many jobs, of all projects, stand in each state that is not final."""
    counted = session.execute(
        select(JobRow.status, func.count()).where(JobRow.status.not_in(sorted(TERMINAL))).group_by(JobRow.status)
    )
    return {row.status: row[1] for row in counted}


def own_jobs(session: Session, job_ids: Iterable[str], *, project_id: str) -> frozenset[str]:
    """Which of these jobs are this project's."""
    found = session.scalars(select(JobRow.id).where(JobRow.id.in_(list(job_ids)), JobRow.project_id == project_id))
    return frozenset(found)
