"""Attempts that a cluster runs: a dispatcher holds the lease until the process that the cluster starts takes it over.

The handover is one `UPDATE` guarded by the fence, which grows by it: the dispatcher's later writes match no row, and a
second process of the same attempt finds it taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from shared.jobs.claims import as_claim
from shared.jobs.progress import set_phase
from shared.jobs.rows import advance
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, Lease, Orders, ends_in
from shared.store.tables import AttemptRow, DeviceRow, JobRow

_NAME: Final = re.compile(r"tunepool-(?P<id>ftjob-[0-9a-z]{1,40})-(?P<number>[1-9][0-9]{0,8})")


def attempt_name(job_id: str, number: int) -> str:
    """What an attempt is called in a cluster and on the command line: at most 63 of `[a-z0-9-]`, as RFC 1123 has it."""
    return f"tunepool-{job_id}-{number}"


def read_name(name: str) -> tuple[str, int] | None:
    """The job and the number of an attempt; None: it is no such name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match["id"], int(match["number"]))


@dataclass(frozen=True, slots=True)
class Submitted:
    """An attempt that its dispatcher has given to a cluster, or is about to."""

    lease: Lease
    devices: int
    orders: Orders
    noted: dict[str, Any]  # what was last noted of it; empty: nothing

    @property
    def name(self) -> str:
        return attempt_name(self.lease.id, self.lease.attempt)


def submit(session: Session, claim: Claim) -> None:
    """Mark a fresh claim as one that a cluster is to run; in the transaction of the claim."""
    set_phase(session, claim.lease, "submitted")


def submitted(session: Session, worker_id: str) -> list[Submitted]:
    """The attempts that this dispatcher holds, oldest first."""
    rows = session.execute(
        select(JobRow, AttemptRow)
        .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.fence == JobRow.fence))
        .where(
            JobRow.status == "running",
            JobRow.lease_owner == worker_id,
            AttemptRow.ended_at.is_(None),
            AttemptRow.phase == "submitted",
        )
        .order_by(AttemptRow.started_at, JobRow.id)
    ).all()
    return [
        Submitted(
            lease=Lease(kind="job", id=job.id, fence=job.fence, worker_id=worker_id, attempt=attempt.number),
            devices=len(attempt.device_ids),
            orders=Orders(
                cancel=job.cancel_requested_at is not None,
                pause=job.pause_requested_at is not None,
                preempt=job.preempt_requested_at is not None,
            ),
            noted=attempt.cluster or {},
        )
        for job, attempt in rows
    ]


def keep_submitted(session: Session, worker_id: str, *, lease_seconds: float) -> None:
    """Extend the leases of all attempts that this dispatcher holds; those that were handed over are no longer its."""
    session.execute(
        update(JobRow)
        .where(JobRow.status == "running", JobRow.lease_owner == worker_id, JobRow.lease_until.is_not(None))
        .values(lease_until=ends_in(lease_seconds))
    )


def tell(session: Session, lease: Lease, noted: dict[str, Any]) -> bool:
    """Note what the cluster says of an attempt. False: it is ours no more."""
    return advance(session, lease) and set_phase(session, lease, "submitted", cluster=noted)


def take_over(session: Session, name: str, *, worker_id: str, host: str, lease_seconds: float) -> Claim | None:
    """Take the lease of exactly this attempt from its dispatcher. None: it was taken, ended, or cancelled before.

    Raises WrittenByNewerVersion.
    """
    which = read_name(name)
    if which is None:
        return None
    waiting = session.scalars(
        select(AttemptRow).where(
            AttemptRow.job_id == which[0],
            AttemptRow.number == which[1],
            AttemptRow.ended_at.is_(None),
            AttemptRow.phase == "submitted",
        )
    ).one_or_none()
    if waiting is None:
        return None
    fence, device_ids = waiting.fence, tuple(waiting.device_ids)
    taken = session.execute(
        update(JobRow)
        .where(
            JobRow.id == which[0],
            JobRow.status == "running",
            JobRow.fence == fence,
            JobRow.cancel_requested_at.is_(None),
        )
        .values(
            fence=JobRow.fence + 1,
            lease_owner=worker_id,
            lease_until=ends_in(lease_seconds),
            version=JobRow.version + 1,
        )
        .returning(JobRow)
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()
    if taken is None:
        return None
    _carry(session, taken, before=fence, worker_id=worker_id)
    event = NewEvent(f"The cluster started it on {host}", data={"attempt": which[1], "host": host})
    journal.append(session, taken.id, [event])
    return as_claim(session, taken, worker_id=worker_id, device_ids=device_ids)


def _carry(session: Session, job: JobRow, *, before: int, worker_id: str) -> None:
    """Devices and attempt follow to the new fence. The attempt begins now: nobody pays for a cluster's queue."""
    session.execute(
        update(DeviceRow).where(DeviceRow.leased_by == job.id, DeviceRow.fence == before).values(fence=job.fence)
    )
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job.id, AttemptRow.fence == before, AttemptRow.ended_at.is_(None))
        .values(fence=job.fence, worker_id=worker_id, phase="leased", started_at=func.now())
    )


def promised_kind(session: Session, claim: Claim) -> str | None:
    """What kind of device the plan gave this attempt: the devices of its node must be of that kind."""
    return session.scalar(select(DeviceRow.kind).where(DeviceRow.id == claim.device_ids[0]))


def seconds_since_end(session: Session, names: Collection[str]) -> dict[str, float]:
    """For those of these attempts that have ended: how long ago. Unknown names are left out."""
    known = {which: name for name in names if (which := read_name(name)) is not None}
    if not known:
        return {}
    rows = session.execute(
        select(AttemptRow.job_id, AttemptRow.number, func.extract("epoch", func.now() - AttemptRow.ended_at)).where(
            tuple_(AttemptRow.job_id, AttemptRow.number).in_(list(known)), AttemptRow.ended_at.is_not(None)
        )
    )
    return {known[job_id, number]: float(seconds) for job_id, number, seconds in rows}
