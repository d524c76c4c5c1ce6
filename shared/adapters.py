"""Adapters and checkpoints: found by id or by their `ft:` name."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.errors import NotFound
from shared.tables import AdapterRow


def find(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """The adapter with this id or `ft:` name. Raises NotFound."""
    row = session.scalars(
        select(AdapterRow).where(
            (AdapterRow.name == name) | (AdapterRow.id == name),
            AdapterRow.project_id == project_id,
            AdapterRow.deleted_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"The model '{name[:200]}' does not exist in this project.", param="model", code="model_not_found")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[AdapterRow], bool]:
    """Adapters of a project, newest first, and whether more follow."""
    query = select(AdapterRow).where(AdapterRow.project_id == project_id, AdapterRow.deleted_at.is_(None))
    if after is not None:
        query = query.where(AdapterRow.id < after)
    rows = session.scalars(query.order_by(AdapterRow.id.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def of_job(session: Session, job_id: str) -> AdapterRow | None:
    return session.scalars(select(AdapterRow).where(AdapterRow.job_id == job_id, AdapterRow.deleted_at.is_(None))).one_or_none()


def delete(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """Withdraw an adapter; its name is never used again. Raises NotFound."""
    row = find(session, name, project_id=project_id)
    row.deleted_at = session.scalars(select(func.now())).one()
    session.flush()
    return row
