"""Every move of a job, and the only writer of its status: `UPDATE … WHERE id AND status AND fence`, rowcount checked.

Zero rows is a normal answer: somebody else owns the job now, and the caller drops what it has.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Row, func, select, text, update
from sqlalchemy.orm import Session

from shared import gangs, journal, measurements, pool, preflights, usage
from shared.errors import Invalid, NotFound
from shared.ids import new_id
from shared.journal import NewEvent
from shared.leases import (
    Claim,
    FileRef,
    Lease,
    Member,
    Membership,
    NewFile,
    NotUnderstood,
    Orders,
    ends_in,
)
from shared.lifecycle import COUNTED, AttemptOutcome, AttemptPhase, JobStatus, is_terminal
from shared.scheduling import Assignment
from shared.settings import Settings
from shared.spec import AutoValue, CreateJob, JobSpec
from shared.tables import (
    AdapterRow,
    AttemptRow,
    CheckpointRow,
    DeviceRow,
    FileRow,
    JobRow,
    MergeRow,
    OrganizationRow,
    PreflightRow,
    ProjectRow,
)

# --- what users order ------------------------------------------------------------------------------------------------


def request_cancel(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Cancel at once what waits; ask the supervisor of what runs. Asking twice is fine; a finished job is Invalid."""
    job = _own_job(session, job_id, project_id)
    if job.status == "cancelled":
        return job
    _refuse_finished(job, "cancelled")
    if job.status == "running":
        _touch(session, job.id, cancel_requested_at=func.coalesce(JobRow.cancel_requested_at, func.now()))
        journal.append(session, job.id, [NewEvent("Cancellation requested; stopping the trainer")])
    else:
        cancel_waiting(session, job.id, reason="Job cancelled before it started")
    session.refresh(job)
    return job


def request_pause(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Hold a waiting job, or have a running one checkpoint and stop. Raises Invalid when there is nothing to pause."""
    job = _own_job(session, job_id, project_id)
    _refuse_finished(job, "paused")
    if job.status == "validating_files":
        raise Invalid(
            "The job's files are still being checked; it can be paused once it is queued.", code="job_not_pausable"
        )
    if job.status == "queued":
        _touch(session, job.id, status="paused")
        journal.append(session, job.id, [NewEvent("Job paused")])
    elif job.status == "running" and job.pause_requested_at is None:
        _touch(session, job.id, pause_requested_at=func.now())
        journal.append(session, job.id, [NewEvent("Pause requested; the trainer saves a checkpoint and stops")])
    session.refresh(job)
    return job


def resume(session: Session, job_id: str, *, project_id: str) -> JobRow:
    """Put a paused job back in the queue; it continues from its last checkpoint. Raises Invalid for any other job."""
    job = _own_job(session, job_id, project_id)
    if job.status != "paused":
        raise Invalid(f"Only a paused job can be resumed; this one is '{job.status}'.", code="job_not_paused")
    _touch(session, job.id, status="queued", pause_requested_at=None, not_before=None)
    journal.append(session, job.id, [NewEvent("Job resumed; moving job to queued state")])
    session.refresh(job)
    return job


def _own_job(session: Session, job_id: str, project_id: str) -> JobRow:
    job = session.scalars(
        select(JobRow).where(JobRow.id == job_id, JobRow.project_id == project_id).with_for_update()
    ).one_or_none()
    if job is None:
        raise NotFound(f"No fine-tuning job '{job_id[:100]}' in this project.", param="fine_tuning_job_id")
    return job


def _refuse_finished(job: JobRow, wish: str) -> None:
    if is_terminal(job.status):  # type: ignore[arg-type]  # the column is text; the check constraint keeps it in the set
        raise Invalid(f"Job {job.id} has already {job.status}; it cannot be {wish}.", code="job_already_finished")


def _touch(session: Session, job_id: str, **values: Any) -> None:
    """Write a row whose lock this transaction already holds."""
    session.execute(update(JobRow).where(JobRow.id == job_id).values(version=JobRow.version + 1, **values))


def cancel_waiting(session: Session, job_id: str, *, reason: str) -> None:
    """Cancel a job that no trainer works on; a job that runs or has ended stays as it is."""
    cancel_all_waiting(session, [job_id], reason=reason)


def cancel_all_waiting(session: Session, job_ids: Collection[str], *, reason: str) -> list[str]:
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
            version=JobRow.version + 1,
        )
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    journal.append_to_each(session, gone, NewEvent(reason))
    return list(gone)


def request_cancel_of_running(session: Session, job_ids: Collection[str]) -> list[str]:
    """Ask the supervisors of many jobs at once to stop. Returns the jobs that were not asked before."""
    asked = session.scalars(
        update(JobRow)
        .where(JobRow.id.in_(job_ids), JobRow.status == "running", JobRow.cancel_requested_at.is_(None))
        .values(cancel_requested_at=func.now(), version=JobRow.version + 1)
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    journal.append_to_each(session, asked, NewEvent("Cancellation requested; stopping the trainer"))
    return list(asked)


def one_at_a_time(session: Session, what: str) -> None:
    """Serialise transactions that name the same `what`, until this one ends."""
    session.execute(select(turn(what)))


def turn(what: ColumnElement[str] | str) -> ColumnElement[None]:
    """`one_at_a_time` as a column, for a statement that has more to say."""
    return func.pg_advisory_xact_lock(func.hashtextextended(what, 0))


# --- claims ----------------------------------------------------------------------------------------------------------


def claim_training(
    session: Session, *, worker_id: str, pool_name: str, lease_seconds: float, passed_over: Collection[str] = ()
) -> Claim | None:
    """Lease the next job and its devices to this worker, or None when nothing of the plan is its own.

    Jobs that are `passed_over` are not planned for. Raises NotUnderstood; the caller passes that job over too.

    The plan and the lease are one transaction under the pool's advisory lock, so that no two workers see the same
    device free.
    """
    one_at_a_time(session, f"plan:{pool_name}")
    view = pool.snapshot(session, pool_name=pool_name).without(passed_over)
    made = pool.make_plan(view)
    for preemption in made.preemptions:
        _request_preemption(session, preemption.victim_id, for_job_id=preemption.for_job_id, reason=preemption.reason)
    owners = _owners(session, pool_name)
    for assignment in made.assignments:
        parts = _by_worker(assignment.device_ids, owners)
        if worker_id in parts:
            charged = view.charge(assignment.job_id)
            claim = _lease_training(
                session, assignment, parts, worker_id=worker_id, lease_seconds=lease_seconds, charged=charged
            )
            if claim is not None:
                pool.keep_first_etas(session, made)
                return claim
    pool.keep_first_etas(session, made)
    return None


def _owners(session: Session, pool_name: str) -> dict[str, tuple[str, str]]:
    """The worker and the host of each device."""
    rows = session.execute(select(DeviceRow.id, DeviceRow.worker_id, DeviceRow.host).where(DeviceRow.pool == pool_name))
    return {device_id: (worker_id, host) for device_id, worker_id, host in rows}


def _by_worker(device_ids: Sequence[str], owners: dict[str, tuple[str, str]]) -> dict[str, Member]:
    """Each worker's part of an assignment, the workers in their order. Nodes are numbered once a leader is known."""
    parts: dict[str, Member] = {}
    for device_id in sorted(device_ids, key=lambda device_id: (owners[device_id], device_ids.index(device_id))):
        worker_id, host = owners[device_id]
        known = parts[worker_id].device_ids if worker_id in parts else ()
        parts[worker_id] = Member(node=0, worker_id=worker_id, host=host, device_ids=(*known, device_id))
    return parts


def _request_preemption(session: Session, victim_id: str, *, for_job_id: str, reason: str) -> None:
    asked = session.execute(
        update(JobRow)
        .where(JobRow.id == victim_id, JobRow.status == "running", JobRow.preempt_requested_at.is_(None))
        .values(preempt_requested_at=func.now(), version=JobRow.version + 1)
        .returning(JobRow.id)
    ).one_or_none()
    if asked is not None:
        journal.append(
            session,
            victim_id,
            [
                NewEvent(
                    f"Preempted for job {for_job_id}: {reason}. It checkpoints and waits again.",
                    data={"preempted_for": for_job_id},
                )
            ],
        )
        _tell_beneficiary(session, for_job_id, victim_id=victim_id, reason=reason)


def _tell_beneficiary(session: Session, job_id: str, *, victim_id: str, reason: str) -> None:
    # The journal wants the row's lock. Whoever holds it now moves the job elsewhere: then nobody needs this event.
    row = select(JobRow.id).where(JobRow.id == job_id, JobRow.status == "queued").with_for_update(skip_locked=True)
    if session.scalars(row).one_or_none() is not None:
        told = NewEvent(f"Job {victim_id} makes room for this one: {reason}.", data={"preempts": victim_id})
        journal.append(session, job_id, [told])


def _lease_training(
    session: Session,
    assignment: Assignment,
    parts: dict[str, Member],
    *,
    worker_id: str,
    lease_seconds: float,
    charged: float,
) -> Claim | None:
    """Lease a job with all its devices to the worker, which leads where there are further parts; None: not any more."""
    job_id, own = assignment.job_id, parts[worker_id].device_ids
    others = (part for part in parts.values() if part.worker_id != worker_id)
    members = tuple(replace(part, node=node) for node, part in enumerate(others, start=1))
    device_ids = [*own, *(device_id for member in members for device_id in member.device_ids)]
    if not _lock_free(session, device_ids):
        return None
    taken = session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == "queued", JobRow.cancel_requested_at.is_(None))
        .values(
            status="running",
            fence=JobRow.fence + 1,
            attempts=JobRow.attempts + 1,
            lease_owner=worker_id,
            lease_until=ends_in(lease_seconds),
            started_at=func.coalesce(JobRow.started_at, func.now()),
            preempt_requested_at=None,
            pause_requested_at=None,
            charged_seconds=charged,
            backfill=assignment.backfill,
            version=JobRow.version + 1,
        )
        .returning(JobRow)
    ).scalar_one_or_none()
    if taken is None:
        return None
    session.execute(update(DeviceRow).where(DeviceRow.id.in_(device_ids)).values(leased_by=job_id, fence=taken.fence))
    pool.charge(session, taken.project_id, seconds=charged)
    session.add(
        AttemptRow(
            job_id=job_id,
            number=taken.attempts,
            fence=taken.fence,
            worker_id=worker_id,
            device_ids=device_ids,
            phase="leased",
            micro_batch_size=taken.micro_batch_size,
        )
    )
    started = (
        "Fine-tuning job started"
        if taken.attempts == 1
        else f"Fine-tuning job started again (attempt {taken.attempts})"
    )
    events = [NewEvent(started, data={"attempt": taken.attempts, "devices": device_ids})]
    session.flush()
    claim = _claim(session, taken, worker_id=worker_id, device_ids=own, members=members)
    gangs.call(session, claim.lease, members)
    warning = usage.soft_limit_warning(session, taken.project_id)
    journal.append(session, job_id, events if warning is None else [*events, NewEvent(warning, level="warn")])
    return claim


def _lock_free(session: Session, device_ids: Sequence[str]) -> bool:
    """Hold the devices for this transaction; False unless all are there and free: a worker may have left meanwhile."""
    free = select(DeviceRow.id).where(DeviceRow.id.in_(device_ids), DeviceRow.leased_by.is_(None))
    return len(session.scalars(free.order_by(DeviceRow.id).with_for_update()).all()) == len(device_ids)


def claim_membership(session: Session, *, worker_id: str, passed_over: Collection[str] = ()) -> Membership | None:
    """Take this worker's part in an attempt that another one leads, or None when nobody calls. It is no lease.

    Raises NotUnderstood; the caller passes that job over too, and the leader misses it after a while.
    """
    row = gangs.take_call(session, worker_id, passed_over=passed_over)
    if row is None:
        return None
    job = session.get_one(JobRow, row.job_id, populate_existing=True)
    claim = _claim(session, job, worker_id=worker_id, device_ids=tuple(row.device_ids))
    return Membership(claim, row.node)


def claim_validation(
    session: Session, *, worker_id: str, lease_seconds: float, passed_over: Collection[str] = ()
) -> Claim | None:
    """Lease the oldest job whose files are checked and that nobody validates yet. Raises NotUnderstood."""
    unchecked = select(FileRow.id).where(
        FileRow.id.in_([JobRow.training_file, JobRow.validation_file]),
        FileRow.status == "uploaded",
        FileRow.deleted_at.is_(None),
    )
    candidate = (
        select(JobRow.id)
        .where(JobRow.status == "validating_files", JobRow.lease_until.is_(None), ~unchecked.correlate(JobRow).exists())
        .where(JobRow.id.not_in(passed_over))
        .order_by(JobRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = session.execute(
        update(JobRow)
        .where(JobRow.id == candidate)
        .values(
            fence=JobRow.fence + 1,
            lease_owner=worker_id,
            lease_until=ends_in(lease_seconds),
            version=JobRow.version + 1,
        )
        .returning(JobRow)
    ).scalar_one_or_none()
    return None if taken is None else _claim(session, taken, worker_id=worker_id)


def _claim(
    session: Session,
    job: JobRow,
    *,
    worker_id: str,
    device_ids: tuple[str, ...] = (),
    members: tuple[Member, ...] = (),
) -> Claim:
    try:
        request = CreateJob.model_validate(job.request)
        spec = None if job.spec is None else JobSpec.model_validate(job.spec)
    except ValidationError as error:
        raise NotUnderstood(job.id) from error
    return Claim(
        lease=Lease(job_id=job.id, fence=job.fence, worker_id=worker_id, attempt=job.attempts),
        project_id=job.project_id,
        request=request,
        base_model=job.base_model,
        seed=job.seed,
        spec=spec,
        model_name=model_name(session, job),
        training_file=_file_ref(session, job.training_file),
        validation_file=None if job.validation_file is None else _file_ref(session, job.validation_file),
        device_ids=device_ids,
        micro_batch_size=job.micro_batch_size,
        gradient_checkpointing=job.gradient_checkpointing,
        last_checkpoint=job.last_checkpoint,
        members=members,
    )


def _file_ref(session: Session, file_id: str) -> FileRef:
    return FileRef.of(session.get_one(FileRow, file_id))


def model_name(session: Session, job: JobRow) -> str:
    """OpenAI's name of a tuned model: `ft:{base}:{organization}:{suffix}:{id}`."""
    organization = session.scalars(
        select(OrganizationRow.name)
        .join(ProjectRow, ProjectRow.organization_id == OrganizationRow.id)
        .where(ProjectRow.id == job.project_id)
    ).one()
    return f"ft:{job.base_model}:{organization}:{job.suffix or ''}:{job.id.removeprefix('ftjob-')}"


# --- what the holder of a lease writes -------------------------------------------------------------------------------


def _held(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (JobRow.id == lease.job_id, JobRow.fence == lease.fence, JobRow.lease_until.is_not(None))


def heartbeat(
    session: Session, lease: Lease, *, lease_seconds: float, progress: dict[str, Any] | None = None
) -> Orders | None:
    """Extend the lease and learn the orders. None: the lease is lost, and everything done under it is void."""
    values: dict[str, Any] = {"lease_until": ends_in(lease_seconds)}
    if progress is not None:
        values |= {"progress": progress, "version": JobRow.version + 1}
    row = session.execute(
        update(JobRow)
        .where(*_held(lease))
        .values(**values)
        .returning(JobRow.cancel_requested_at, JobRow.pause_requested_at, JobRow.preempt_requested_at)
    ).one_or_none()
    return _orders(row)


def read_orders(session: Session, lease: Lease) -> Orders | None:
    """The orders without extending the lease: cheap enough to ask every second."""
    return _orders(
        session.execute(
            select(JobRow.cancel_requested_at, JobRow.pause_requested_at, JobRow.preempt_requested_at).where(
                *_held(lease)
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
    found = session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.job_id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(phase=phase, **values)
        .returning(AttemptRow.number)
    ).one_or_none()
    return found is not None


def record(
    session: Session, lease: Lease, events: Sequence[NewEvent], *, progress: dict[str, Any] | None = None
) -> bool:
    """Append events of the attempt; False when the lease is lost."""
    if not _lock(session, lease, progress=progress):
        return False
    journal.append(session, lease.job_id, events)
    return True


def _lock(session: Session, lease: Lease, *, progress: dict[str, Any] | None = None, **values: Any) -> bool:
    if progress is not None:
        values["progress"] = progress
        values["estimated_finish"] = func.now() + timedelta(seconds=progress["seconds_left"])
    found = session.execute(
        update(JobRow).where(*_held(lease)).values(version=JobRow.version + 1, **values).returning(JobRow.id)
    ).one_or_none()
    return found is not None


def record_checkpoint(
    session: Session, lease: Lease, *, step: int, name: str, metrics: dict[str, Any], manifest: dict[str, Any]
) -> bool:
    """Publish a checkpoint whose files are all in the store. The job's next attempt resumes from the newest one."""
    if not _lock(session, lease, last_checkpoint=manifest):
        return False
    # An attempt that resumed from an older checkpoint reaches the same step again: the first object stays.
    known = session.scalars(
        select(CheckpointRow).where(CheckpointRow.job_id == lease.job_id, CheckpointRow.step == step)
    ).one_or_none()
    if known is None:
        session.add(
            CheckpointRow(
                id=new_id("ftckpt_"),
                job_id=lease.job_id,
                fence=lease.fence,
                step=step,
                name=name,
                metrics=metrics,
                manifest=manifest,
            )
        )
    session.flush()
    return True


def validated(
    session: Session,
    lease: Lease,
    *,
    spec: JobSpec,
    auto: Sequence[AutoValue],
    bytes_per_device: int,
    expected_seconds: float | None = None,
) -> bool:
    """validating_files -> queued, with every value settled."""
    moved = session.execute(
        update(JobRow)
        .where(*_held(lease), JobRow.status == "validating_files")
        .values(
            status="queued",
            spec=spec.model_dump(mode="json"),
            auto=[value.model_dump(mode="json") for value in auto],
            gpus=spec.placement.gpus,
            nodes=spec.placement.nodes,
            bytes_per_device=bytes_per_device,
            expected_seconds=expected_seconds,
            queued_at=func.now(),
            lease_owner=None,
            lease_until=None,
            failures=0,
            version=JobRow.version + 1,
        )
        .returning(JobRow.id)
    ).one_or_none()
    if moved is not None:
        journal.append(session, lease.job_id, [NewEvent("Files validated, moving job to queued state")])
    return moved is not None


def succeed(
    session: Session,
    lease: Lease,
    *,
    manifest: dict[str, Any],
    result_file: NewFile | None = None,
    trained_tokens: int | None = None,
    peak_bytes: int | None = None,
    train_seconds: float | None = None,
    reason: str = "",
) -> bool:
    """running -> succeeded: the one act that publishes. False when cancelled first, or fenced off."""
    job = _settle(
        session,
        lease,
        "succeeded",
        outcome="succeeded",
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"manifest": manifest, "trained_tokens": trained_tokens, "error": None},
        attempt_values={"peak_bytes": peak_bytes, "exit_code": 0},
    )
    if job is None:
        return False
    name = model_name(session, job)
    if result_file is not None:
        session.add(FileRow(project_id=job.project_id, status="processed", **_as_row(result_file)))
        session.flush()
    session.add(
        AdapterRow(
            id=new_id("adapter_"),
            job_id=job.id,
            project_id=job.project_id,
            name=name,
            base_model=job.base_model,
            manifest=manifest,
        )
    )
    if peak_bytes and trained_tokens and train_seconds:
        _measure(session, job, lease, peak_bytes=peak_bytes, trained_tokens=trained_tokens, train_seconds=train_seconds)
    _touch(session, job.id, fine_tuned_model=name, result_file=result_file.id if result_file else None)
    journal.append(
        session,
        job.id,
        [
            NewEvent(f"New fine-tuned model created: {name}", data={"reason": reason} if reason else None),
            NewEvent("The job has successfully completed"),
        ],
    )
    return True


def _measure(session: Session, job: JobRow, lease: Lease, **took: Any) -> None:
    device_ids = session.scalars(
        select(AttemptRow.device_ids).where(AttemptRow.job_id == job.id, AttemptRow.fence == lease.fence)
    ).one_or_none()
    measurements.record(session, job, device_ids=device_ids or (), **took)


def _as_row(file: NewFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": file.bytes,
        "sha256": file.sha256,
        "key": file.key,
    }


def fail(
    session: Session,
    lease: Lease,
    *,
    code: str,
    message: str,
    param: str | None = None,
    exit_code: int | None = None,
    outcome: AttemptOutcome = "failed",
    peak_bytes: int | None = None,
) -> bool:
    """running or validating_files -> failed, for good. A cancel that was asked first wins."""
    error = {"code": code, "message": message, "param": param}
    job = _settle(
        session,
        lease,
        "failed",
        outcome=outcome,
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"error": error},
        attempt_values={"exit_code": exit_code, "error": error, "peak_bytes": peak_bytes},
    )
    if job is None:
        return False
    journal.append(session, job.id, [NewEvent(message, level="error", data={"code": code, "param": param})])
    return True


def confirm_cancelled(session: Session, lease: Lease, *, exit_code: int | None = None) -> bool:
    """running -> cancelled, once the trainer is proven dead."""
    job = _settle(
        session,
        lease,
        "cancelled",
        outcome="cancelled",
        only_if=JobRow.cancel_requested_at.is_not(None),
        attempt_values={"exit_code": exit_code},
    )
    if job is not None:
        journal.append(session, job.id, [NewEvent("Job cancelled; the trainer has stopped and its devices are free")])
    return job is not None


def confirm_paused(session: Session, lease: Lease, *, exit_code: int | None = None) -> bool:
    """running -> paused, once the trainer has checkpointed and stopped."""
    job = _settle(
        session,
        lease,
        "paused",
        outcome="paused",
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"pause_requested_at": None},
        attempt_values={"exit_code": exit_code},
    )
    if job is not None:
        journal.append(session, job.id, [NewEvent("Job paused; its last checkpoint is kept")])
    return job is not None


def give_back(
    session: Session,
    lease: Lease,
    *,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    settings: Settings,
    exit_code: int | None = None,
    peak_bytes: int | None = None,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool | None = None,
) -> JobStatus | None:
    """End the attempt and queue the job again, or fail it when its attempts are used up.

    Returns the status it has now, None when the lease is lost. Outcomes outside `lifecycle.COUNTED` use up no attempt
    and wait for no back-off. A cancel that was asked first wins.
    """
    job = session.scalars(
        select(JobRow).where(*_held(lease), JobRow.status == "running").with_for_update()
    ).one_or_none()
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return "cancelled" if confirm_cancelled(session, lease, exit_code=exit_code) else None
    counted = outcome in COUNTED
    if counted and job.failures + 1 >= settings.max_attempts:
        last = f"{message} This was attempt {job.failures + 1} of {settings.max_attempts}."
        return (
            "failed"
            if fail(
                session, lease, code=code, message=last, exit_code=exit_code, outcome=outcome, peak_bytes=peak_bytes
            )
            else None
        )
    wait = backoff_seconds(job.failures, settings=settings) if counted else 0.0
    values: dict[str, Any] = {
        "failures": JobRow.failures + (1 if counted else 0),
        "not_before": func.now() + timedelta(seconds=wait) if wait else None,
        "preempt_requested_at": None,
    }
    if micro_batch_size is not None:
        values["micro_batch_size"] = micro_batch_size
    if gradient_checkpointing is not None:
        values["gradient_checkpointing"] = gradient_checkpointing
    settled = _settle(
        session,
        lease,
        "queued",
        outcome=outcome,
        job_values=values,
        attempt_values={
            "exit_code": exit_code,
            "peak_bytes": peak_bytes,
            "error": {"code": code, "message": message, "param": None},
        },
    )
    if settled is None:
        return None
    journal.append(
        session,
        job.id,
        [
            NewEvent(
                message,
                level="warn" if counted else "info",
                data={"code": code, "outcome": outcome, "wait_seconds": round(wait, 1)},
            )
        ],
    )
    return "queued"


def backoff_seconds(failures: int, *, settings: Settings) -> float:
    """Full jitter: uniform below base × 2^failures, capped (AWS blog, "Exponential Backoff And Jitter")."""
    ceiling = min(settings.backoff_cap_seconds, settings.backoff_base_seconds * 2**failures)
    return random.uniform(0, ceiling)  # noqa: S311  # spreading load, no secret


def _settle(
    session: Session,
    lease: Lease,
    status: JobStatus,
    *,
    outcome: AttemptOutcome,
    only_if: ColumnElement[bool] | None = None,
    job_values: dict[str, Any] | None = None,
    attempt_values: dict[str, Any] | None = None,
) -> JobRow | None:
    """End an attempt: move the job, free its devices, close the attempt, charge the project. All or nothing."""
    final = is_terminal(status)
    job = session.execute(
        update(JobRow)
        .where(*_held(lease), *(() if only_if is None else (only_if,)))
        .values(
            status=status,
            lease_owner=None,
            lease_until=None,
            finished_at=func.now() if final else None,
            estimated_finish=None,
            version=JobRow.version + 1,
            **(job_values or {}),
        )
        .returning(JobRow)
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()
    if job is None:
        return None
    session.execute(
        update(DeviceRow)
        .where(DeviceRow.leased_by == lease.job_id, DeviceRow.fence == lease.fence)
        .values(leased_by=None, fence=None)
    )
    ended = session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.job_id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(ended_at=func.now(), outcome=outcome, **(attempt_values or {}))
        .returning(AttemptRow.started_at, AttemptRow.ended_at, AttemptRow.device_ids)
    ).one_or_none()
    if ended is not None:
        seconds = (ended.ended_at - ended.started_at).total_seconds() * len(ended.device_ids)
        # Device-seconds come from the lease, not from wall time. The charge made at the lease becomes the real one.
        pool.charge(session, job.project_id, seconds=seconds - job.charged_seconds)
        _touch(session, job.id, device_seconds=JobRow.device_seconds + seconds, charged_seconds=0.0)
    return job


# --- the reaper ------------------------------------------------------------------------------------------------------


def reap(session: Session, *, settings: Settings, limit: int = 100) -> list[str]:
    """Take back the jobs of leases that ended `grace_seconds` ago. Returns their ids."""
    dead = session.scalars(
        select(JobRow)
        .where(JobRow.lease_until < func.now() - timedelta(seconds=settings.grace_seconds))
        .order_by(JobRow.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for job in dead:
        lease = Lease(job_id=job.id, fence=job.fence, worker_id=job.lease_owner or "", attempt=job.attempts)
        if job.status == "running":
            give_back(
                session,
                lease,
                outcome="lost",
                code="worker_lost",
                message="The worker of this job stopped answering.",
                settings=settings,
            )
        else:
            _reopen_validation(session, job, settings=settings)
    return [job.id for job in dead]


def _reopen_validation(session: Session, job: JobRow, *, settings: Settings) -> None:
    if job.failures + 1 >= settings.max_attempts:
        lease = Lease(job_id=job.id, fence=job.fence, worker_id=job.lease_owner or "", attempt=job.attempts)
        fail(
            session,
            lease,
            code="validation_lost",
            message=f"Checking this job's files ended {settings.max_attempts} workers. Look for extreme rows.",
            outcome="lost",
        )
        return
    _touch(session, job.id, lease_owner=None, lease_until=None, fence=JobRow.fence + 1, failures=JobRow.failures + 1)


def waiting_lanes(session: Session) -> set[str]:
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
    return {lane for lane, wanted in (("training", row.training), ("cpu", row.cpu)) if wanted}


def database_age_seconds(session: Session) -> float:
    """Seconds since Postgres started: a reaper stays quiet until every worker had time to beat again."""
    return float(session.scalar(text("select extract(epoch from now() - pg_postmaster_start_time())")) or 0.0)
