"""Writes of the holder of a lease while its attempt runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select, update
from sqlalchemy.orm import Session

from shared.contract.documents import JobProgress
from shared.ids import new_id
from shared.jobs.rows import advance, held
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.lease.values import Lease, Orders, ends_in
from shared.store.lifecycle import AttemptPhase
from shared.store.tables import AttemptRow, CheckpointRow, JobRow


def heartbeat(session: Session, lease: Lease, *, lease_seconds: float) -> Orders | None:
    """Extend the lease and learn the orders. None: the lease is lost, and everything done under it is void."""
    row = session.execute(
        update(JobRow)
        .where(*held(lease))
        .values(lease_until=ends_in(lease_seconds))
        .returning(JobRow.cancel_requested_at, JobRow.pause_requested_at, JobRow.preempt_requested_at)
    ).one_or_none()
    return _orders(row)


def read_orders(session: Session, lease: Lease) -> Orders | None:
    """The orders without extending the lease: cheap enough to ask every second."""
    return _orders(
        session.execute(
            select(JobRow.cancel_requested_at, JobRow.pause_requested_at, JobRow.preempt_requested_at).where(
                *held(lease)
            )
        ).one_or_none()
    )


def _orders(row: Row[datetime | None, datetime | None, datetime | None] | None) -> Orders | None:
    if row is None:
        return None
    return Orders(
        cancel=row.cancel_requested_at is not None,
        pause=row.pause_requested_at is not None,
        preempt=row.preempt_requested_at is not None,
    )


def set_phase(session: Session, lease: Lease, phase: AttemptPhase, **values: Any) -> bool:
    """Note how far the attempt is; `values` are further columns of its row."""
    updated = session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(phase=phase, **values)
        .returning(AttemptRow.number)
    ).one_or_none()
    return updated is not None


def record(
    session: Session,
    lease: Lease,
    events: Sequence[NewEvent],
    *,
    progress: JobProgress | None = None,
    sharing: int = 1,
) -> bool:
    """Append events of the attempt; False when the lease is lost. `sharing`: jobs that take turns on its device."""
    if not advance(session, lease, progress=progress, sharing=sharing):
        return False
    if progress is not None:
        _note_work(session, lease, progress)
    journal.append(session, lease.id, events)
    return True


def _note_work(session: Session, lease: Lease, progress: JobProgress) -> None:
    """On the attempt's row, from where it began to where it is: what all attempts did only grows."""
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(
            first_step=func.coalesce(AttemptRow.first_step, progress.step),
            last_step=progress.step,
            first_tokens=func.coalesce(AttemptRow.first_tokens, progress.trained_tokens),
            last_tokens=progress.trained_tokens,
        )
    )


def record_checkpoint(
    session: Session, lease: Lease, *, step: int, name: str, metrics: dict[str, Any], manifest: dict[str, Any]
) -> bool:
    """Publish a checkpoint whose files are all in the store. The job's next attempt resumes from the newest one."""
    if not advance(session, lease, last_checkpoint=manifest):
        return False
    # An attempt that resumed from an older checkpoint reaches the same step again: the first object stays.
    known = session.scalars(
        select(CheckpointRow).where(CheckpointRow.job_id == lease.id, CheckpointRow.step == step)
    ).one_or_none()
    if known is None:
        session.add(
            CheckpointRow(
                id=new_id("ftckpt_"),
                job_id=lease.id,
                fence=lease.fence,
                step=step,
                name=name,
                metrics=metrics,
                manifest=manifest,
            )
        )
    session.flush()
    return True
