"""Devices that several jobs share: which job's name the device has, who hears of a change, and who pays for what time.

A device names one job that has it. Of jobs that train together the device names one. When that one ends, it names
another, so the device is free only once the last has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.lease.values import Lease
from shared.store.tables import AttemptRow, DeviceRow, JobRow


def tell_each(session: Session, leases: Sequence[Lease], *, device_id: str) -> None:
    """Note on each attempt that they have the device together, in equal parts until somebody measures."""
    others = len(leases) - 1
    words = f"Trains together with {others} other{'s' if others > 1 else ''} on {device_id}"
    for lease in leases:
        session.execute(
            update(AttemptRow)
            .where(AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence)
            .values(together=len(leases), device_share=1 / len(leases))
        )
        journal.append(session, lease.id, [NewEvent(words, data={"together": len(leases), "device": device_id})])


def note_share(session: Session, lease: Lease, share: float) -> None:
    """Write which part of the device's time was the attempt's own, from its start until now."""
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(device_share=min(1.0, max(0.0, share)))
    )


def let_go(session: Session, lease: Lease, device_ids: Sequence[str], *, shared: bool) -> None:
    """The attempt has ended: its devices are free, or another's that trains on them. Its end is written already."""
    if not shared:
        _free(session, lease)
        return
    # First the device's lock: of two that end at once, the second sees whom the first has named.
    held = DeviceRow.id.in_(list(device_ids))
    session.scalars(select(DeviceRow.id).where(held).order_by(DeviceRow.id).with_for_update()).all()
    heir = session.execute(
        select(JobRow.id, JobRow.fence)
        .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.fence == JobRow.fence))
        .where(
            JobRow.status == "running",
            JobRow.id != lease.id,
            AttemptRow.ended_at.is_(None),
            AttemptRow.together.is_not(None),
            AttemptRow.device_ids == list(device_ids),
        )
        .order_by(JobRow.id)
        .limit(1)
    ).one_or_none()
    if heir is None:
        _free(session, lease)
    else:
        session.execute(
            update(DeviceRow)
            .where(held, DeviceRow.leased_by == lease.id, DeviceRow.fence == lease.fence)
            .values(leased_by=heir.id, fence=heir.fence)
        )


def _free(session: Session, lease: Lease) -> None:
    session.execute(
        update(DeviceRow)
        .where(DeviceRow.leased_by == lease.id, DeviceRow.fence == lease.fence)
        .values(leased_by=None, fence=None)
    )
