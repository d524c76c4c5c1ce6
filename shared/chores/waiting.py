"""Which lanes have work: what a bell is rung for that no commit rings for."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.chores import preflights
from shared.store.lifecycle import Lane
from shared.store.tables import FileRow, JobRow, MergeRow, PreflightRow


def waiting(session: Session) -> set[Lane]:
    """Lanes that have work to wake a worker for: 'cpu', and 'training' when a queued job may start now."""
    row = session.execute(
        select(
            select(JobRow.id)
            .where(JobRow.status == "queued", func.coalesce(JobRow.not_before, func.now()) <= func.now())
            .exists()
            .label("training"),
            (
                select(JobRow.id).where(JobRow.status == "validating_files", JobRow.lease_until.is_(None)).exists()
                | select(FileRow.id).where(FileRow.status == "uploaded", FileRow.deleted_at.is_(None)).exists()
                | select(PreflightRow.id).where(preflights.ready()).exists()
                | select(MergeRow.id)
                .where(
                    MergeRow.status.in_(["queued", "running"]),
                    MergeRow.deleted_at.is_(None),
                    func.coalesce(MergeRow.lease_until, func.now()) <= func.now(),
                )
                .exists()
            ).label("cpu"),
        )
    ).one()
    wanted: dict[Lane, bool] = {"training": row.training, "cpu": row.cpu}
    return {lane for lane, has_work in wanted.items() if has_work}
