"""What becomes of jobs whose workers, or whose cluster's dispatcher, are gone."""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.jobs.endings import fail, give_back
from shared.jobs.rows import touch
from shared.lease.lease import dead
from shared.lease.values import Lease
from shared.settings import Settings
from shared.store.tables import AttemptRow, JobRow


def never_began(session: Session, lease: Lease) -> bool:
    """Whether a cluster has the attempt and never started it. It then begins now, so that its end charges nothing."""
    updated = session.execute(
        update(AttemptRow)
        .where(
            AttemptRow.job_id == lease.id,
            AttemptRow.fence == lease.fence,
            AttemptRow.ended_at.is_(None),
            AttemptRow.phase == "submitted",
        )
        .values(started_at=func.now())
        .returning(AttemptRow.number)
    ).one_or_none()
    return updated is not None


def reap(session: Session, *, settings: Settings, limit: int = 100) -> list[str]:
    """Take back the jobs of leases that ended `grace_seconds` ago. Returns their ids."""
    rows = session.scalars(
        select(JobRow)
        .where(*dead(JobRow, grace_seconds=settings.grace_seconds))
        .order_by(JobRow.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for job in rows:
        lease = Lease(kind="job", id=job.id, fence=job.fence, worker_id=job.lease_owner or "", attempt=job.attempts)
        if job.status == "running" and never_began(session, lease):
            give_back(
                session,
                lease,
                outcome="drained",  # it cost no try: nothing has been tried
                code="dispatcher_lost",
                message="The dispatcher stopped answering before the cluster had started this job.",
                settings=settings,
            )
        elif job.status == "running":
            give_back(
                session,
                lease,
                outcome="lost",
                code="worker_lost",
                message="The worker of this job stopped answering.",
                settings=settings,
            )
        elif job.failures + 1 >= settings.max_attempts:
            fail(
                session,
                lease,
                code="validation_lost",
                message=f"Checking this job's files ended {settings.max_attempts} workers. Look for extreme rows.",
                outcome="lost",
            )
        else:
            again = {"fence": JobRow.fence + 1, "failures": JobRow.failures + 1}
            touch(session, job.id, lease_owner=None, lease_until=None, **again)
    return [job.id for job in rows]
