"""Orders about jobs beyond OpenAI's API: hold, release, priority, bulk cancel. Each is audited.

A holder of `admin` orders across projects; any other caller only what is its own project's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.contract.spec import Queue
from shared.errors import Invalid, NotFound
from shared.jobs import moves, submission
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.store.lifecycle import TERMINAL
from shared.store.locks import one_at_a_time
from shared.store.tables import JobRow
from shared.tenants import audit, keys
from shared.tenants.keys import Caller


def set_held(session: Session, caller: Caller, job_id: str, *, held: bool) -> JobRow:
    """Keep a job from being started, or let it go; what runs goes on. Raises NotFound, Invalid for an ended job."""
    job = _job(session, caller, job_id, wish="held" if held else "released")
    before = job.held
    session.execute(update(JobRow).where(JobRow.id == job.id).values(held=held, version=JobRow.version + 1))
    if before != held:
        message = "Job held; it is not started until it is released" if held else "Job released"
        journal.append(session, job.id, [NewEvent(message)])
    action = "job.hold" if held else "job.release"
    audit.record(session, caller, action, job.id, before={"held": before}, after={"held": held})
    session.refresh(job)
    return job


def set_priority(session: Session, caller: Caller, job_id: str, *, priority: int | None, tier: str | None) -> JobRow:
    """Move a job in the order. A key without `admin` stays within its bounds. Raises NotFound, Invalid, Forbidden."""
    job = _job(session, caller, job_id, wish="moved")
    before = {"tier": job.tier, "priority": job.priority}
    after = {"tier": tier or job.tier, "priority": job.priority if priority is None else priority}
    if not caller.operates:
        submission.refuse_out_of_bounds(Queue.model_validate(after), caller)
    session.execute(
        update(JobRow)
        .where(JobRow.id == job.id)
        .values(tier=after["tier"], priority=after["priority"], version=JobRow.version + 1)
    )
    event = NewEvent(f"Tier and priority are now {after['tier']} and {after['priority']}", data={"before": before})
    journal.append(session, job.id, [event])
    audit.record(session, caller, "job.priority", job.id, before=before, after=after)
    session.refresh(job)
    return job


def _job(session: Session, caller: Caller, job_id: str, *, wish: str) -> JobRow:
    job = session.scalars(select(JobRow).where(JobRow.id == job_id).with_for_update()).one_or_none()
    if job is None or not (caller.operates or job.project_id == caller.project_id):
        raise NotFound(f"Could not find fine tune: {job_id[:100]}", param="fine_tuning_job_id")
    if job.status in TERMINAL:
        raise Invalid(f"Job {job.id} has already {job.status}; it cannot be {wish}.", code="job_already_finished")
    return job


@dataclass(frozen=True, slots=True)
class Selection:
    """Which jobs an order means. An empty filter does not narrow."""

    statuses: tuple[str, ...]
    job_ids: tuple[str, ...] = ()
    group: str | None = None
    metadata: dict[str, str] | None = None
    project_id: str | None = None  # None: the caller's own


def cancel_all(session: Session, caller: Caller, wanted: Selection, *, pool_name: str) -> tuple[list[str], list[str]]:
    """Cancel every job of a selection: (cancelled at once, asked to stop). Raises Forbidden for another project."""
    project_id = wanted.project_id or caller.project_id
    if project_id != caller.project_id:
        caller.must(keys.ADMIN)
    # A pull locks several jobs under this lock, in an order of its own; so two such acts never wait for each other.
    one_at_a_time(session, f"plan:{pool_name}")
    rows = session.execute(_selected(wanted, project_id)).all()
    running = [row.id for row in rows if row.status == "running"]
    gone = moves.cancel_all_waiting(
        session, [row.id for row in rows if row.status != "running"], reason="Job cancelled with others of its project"
    )
    asked = moves.request_cancel_of_running(session, running)
    after = {"selection": asdict(wanted), "cancelled": len(gone), "asked_to_stop": len(asked)}
    audit.record(session, caller, "jobs.cancel", project_id, after=after)
    return sorted(gone), sorted(asked)


def _selected(wanted: Selection, project_id: str) -> Any:
    query = select(JobRow.id, JobRow.status).where(
        JobRow.project_id == project_id, JobRow.status.in_(set(wanted.statuses) - TERMINAL)
    )
    if wanted.job_ids:
        query = query.where(JobRow.id.in_(wanted.job_ids))
    if wanted.group is not None:
        query = query.where(JobRow.group_name == wanted.group)
    if wanted.metadata:
        query = query.where(JobRow.job_metadata.contains(wanted.metadata))
    return query.order_by(JobRow.id).with_for_update()
