"""Cancel, pause and resume. A waiting job is moved at once; the supervisor of a running one is asked."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.errors import Invalid, NotFound
from shared.jobs.rows import touch
from shared.lease import journal, outbox
from shared.lease.journal import NewEvent
from shared.store.lifecycle import is_terminal
from shared.store.tables import JobRow


def request_cancel(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Cancel a waiting job at once, or ask the supervisor of a running one. Twice is fine; an ended job is Invalid."""
    job = _own_job(session, job_id, project_id)
    if job.status == "cancelled":
        return job
    _refuse_finished(job, "cancelled")
    if job.status == "running":
        touch(session, job.id, cancel_requested_at=func.coalesce(JobRow.cancel_requested_at, func.now()))
        journal.append(session, job.id, [NewEvent("Cancellation requested; stopping the trainer")])
    else:
        cancel_waiting(session, job.id, reason="Job cancelled before it started")
    session.refresh(job)
    return job


def request_pause(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Hold a waiting job, or have a running one checkpoint and stop; one whose files are checked is held afterwards.

    Raises Invalid when there is nothing to pause.
    """
    job = _own_job(session, job_id, project_id)
    _refuse_finished(job, "paused")
    if job.status == "validating_files" and job.pause_requested_at is None:
        touch(session, job.id, pause_requested_at=func.now())
        journal.append(session, job.id, [NewEvent("Pause requested; the job is held once its files are checked")])
    elif job.status == "queued":
        touch(session, job.id, status="paused")
        journal.append(session, job.id, [NewEvent("Job paused")])
    elif job.status == "running" and job.pause_requested_at is None:
        touch(session, job.id, pause_requested_at=func.now())
        journal.append(session, job.id, [NewEvent("Pause requested; the trainer saves a checkpoint and stops")])
    session.refresh(job)
    return job


def resume(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Put a paused job back in the queue; it continues from its last checkpoint. Raises Invalid for any other job."""
    job = _own_job(session, job_id, project_id)
    if job.status == "validating_files" and job.pause_requested_at is not None:
        touch(session, job.id, pause_requested_at=None)
        journal.append(session, job.id, [NewEvent("Job resumed; it is queued once its files are checked")])
        session.refresh(job)
        return job
    if job.status != "paused":
        raise Invalid(f"Only a paused job can be resumed; this one is '{job.status}'.", code="job_not_paused")
    touch(session, job.id, status="queued", pause_requested_at=None, not_before=None)
    journal.append(session, job.id, [NewEvent("Job resumed; moving job to queued state")])
    session.refresh(job)
    return job


def _own_job(session: Session, job_id: str, project_id: str) -> JobRow:
    job = session.scalars(
        select(JobRow).where(JobRow.id == job_id, JobRow.project_id == project_id).with_for_update()
    ).one_or_none()
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id[:100]}", param="fine_tuning_job_id")
    return job


def _refuse_finished(job: JobRow, wish: str) -> None:
    if is_terminal(job.status):  # type: ignore[arg-type]  # the column is text; the check constraint keeps it in the set
        raise Invalid(f"Job {job.id} has already {job.status}; it cannot be {wish}.", code="job_already_finished")


def cancel_waiting(session: Session, job_id: str, *, reason: str) -> None:
    """Cancel a job that no trainer works on; a job that runs or has ended stays as it is."""
    cancel_all_waiting(session, [job_id], reason=reason)


def cancel_all_waiting(
    session: Session, job_ids: Collection[str], *, reason: str, superseded_by: str | None = None
) -> list[str]:
    """`cancel_waiting` for many at once: two statements and their events. Returns the jobs that are cancelled now."""
    # A file check in progress holds a lease too: the higher fence makes its result worthless.
    gone = session.scalars(
        update(JobRow)
        .where(JobRow.id.in_(job_ids), JobRow.status.in_(["validating_files", "queued", "paused"]))
        .values(
            status="cancelled",
            fence=JobRow.fence + 1,
            lease_owner=None,
            lease_until=None,
            finished_at=func.now(),
            superseded_by=superseded_by,
            version=JobRow.version + 1,
        )
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    journal.append_to_each(session, gone, NewEvent(reason))
    outbox.tell(session, gone, status="cancelled")
    return list(gone)


def request_cancel_of_running(
    session: Session,
    job_ids: Collection[str],
    *,
    reason: str = "Cancellation requested",
    superseded_by: str | None = None,
) -> list[str]:
    """Ask the supervisors of many jobs at once to stop. Returns the jobs that were not asked before."""
    asked = session.scalars(
        update(JobRow)
        .where(JobRow.id.in_(job_ids), JobRow.status == "running", JobRow.cancel_requested_at.is_(None))
        .values(cancel_requested_at=func.now(), superseded_by=superseded_by, version=JobRow.version + 1)
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    journal.append_to_each(session, asked, NewEvent(f"{reason}; stopping the trainer"))
    return list(asked)
