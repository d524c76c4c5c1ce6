"""Looks which lanes have work. The janitor rings for work that came without a commit, such as a passed deadline."""

from __future__ import annotations

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from shared.chores.table import CHORES
from shared.store.lifecycle import Lane
from shared.store.tables import JobRow


def waiting(session: Session) -> set[Lane]:
    """Lanes that have work to wake a worker for: 'cpu', and 'training' when a queued job may start now."""
    chores = (select(work.kind.row.id).where(work.may_begin()).exists() for work in CHORES.values())
    row = session.execute(
        select(
            select(JobRow.id)
            .where(JobRow.status == "queued", func.coalesce(JobRow.not_before, func.now()) <= func.now())
            .exists()
            .label("training"),
            or_(*chores).label("cpu"),
        )
    ).one()
    wanted: dict[Lane, bool] = {"training": row.training, "cpu": row.cpu}
    return {lane for lane, has_work in wanted.items() if has_work}
