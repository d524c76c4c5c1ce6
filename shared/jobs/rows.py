"""Statements of a job's row that the other modules here share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from shared.contract.documents import JobProgress
from shared.lease.values import Lease
from shared.store.tables import JobRow, OrganizationRow, ProjectRow


def touch(session: Session, job_id: str, **values: Any) -> None:
    """Write a row whose lock this transaction already holds."""
    session.execute(update(JobRow).where(JobRow.id == job_id).values(version=JobRow.version + 1, **values))


def held(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    """Whether the lease is still its holder's: nobody may write more than this lets them."""
    return (JobRow.id == lease.id, JobRow.fence == lease.fence, JobRow.lease_until.is_not(None))


def advance(
    session: Session, lease: Lease, *, progress: JobProgress | None = None, sharing: int = 1, **values: Any
) -> bool:
    """Write a job's row under its lease; False when that is lost. `sharing`: jobs that take turns on its device."""
    if progress is not None:
        values["progress"] = progress.document()
        values["estimated_finish"] = func.now() + timedelta(seconds=progress.seconds_left * sharing)
    updated = session.execute(
        update(JobRow).where(*held(lease)).values(version=JobRow.version + 1, **values).returning(JobRow.id)
    ).one_or_none()
    return updated is not None


def model_name(session: Session, job: JobRow) -> str:
    """OpenAI's name of a tuned model: `ft:{base}:{organization}:{suffix}:{id}`."""
    organization = session.scalars(
        select(OrganizationRow.name)
        .join(ProjectRow, ProjectRow.organization_id == OrganizationRow.id)
        .where(ProjectRow.id == job.project_id)
    ).one()
    return f"ft:{job.base_model}:{organization}:{job.suffix or ''}:{job.id.removeprefix('ftjob-')}"
