"""Accepting a job: the files it names, the project's room, and the request that was already made once."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from shared import jobs, journal, usage
from shared.errors import Conflict, Forbidden, Invalid, LimitReached
from shared.ids import new_id
from shared.journal import NewEvent
from shared.keys import Caller
from shared.preemption import RANK
from shared.spec import BaseModelRef, CreateJob, Queue
from shared.tables import ApiKeyRow, FileRow, IdempotencyRow, JobRow, ProjectRow

RETRY_WINDOW = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Submission:
    job: JobRow
    replayed: bool  # this very request had already made the job
    warning: str | None = None  # the project has passed its soft limit


def submit(
    session: Session,
    request: CreateJob,
    *,
    caller: Caller,
    base: BaseModelRef,
    request_sha256: str,
    retried: bool = False,
    idempotency_key: str | None = None,
) -> Submission:
    """Accept a job, or return the one that this request has already made.

    `retried`: the client says this is a retry of a POST whose answer it never saw; the same body under the same key
    within ten minutes is then the same job. Raises Invalid, NotFound, Conflict, Forbidden, LimitReached.
    """
    jobs.one_at_a_time(session, f"submit:{caller.key_id}:{request_sha256}")
    earlier = _earlier(session, caller, request_sha256, retried=retried, idempotency_key=idempotency_key)
    if earlier is not None:
        return Submission(earlier, replayed=True)
    refuse_out_of_bounds(request.tunepool.queue or Queue(), caller)
    training = _usable_file(session, caller, request.training_file, param="training_file")
    validation = None
    if request.validation_file is not None:
        validation = _usable_file(session, caller, request.validation_file, param="validation_file")
    project = session.get_one(ProjectRow, caller.project_id)
    _refuse_when_full(session, project, session.get_one(ApiKeyRow, caller.key_id))
    job = _new_job(request, caller=caller, base=base, request_sha256=request_sha256)
    session.add(job)
    session.flush()  # fills in what the database sets
    if idempotency_key is not None:
        session.add(
            IdempotencyRow(
                key_id=caller.key_id, idempotency_key=idempotency_key, request_sha256=request_sha256, job_id=job.id
            )
        )
    names = training.filename if validation is None else f"{training.filename}, {validation.filename}"
    warning = usage.soft_limit_warning(session, project.id)
    said = [NewEvent(f"Created fine-tuning job: {job.id}"), NewEvent(f"Validating training file: {names}")]
    journal.append(session, job.id, said if warning is None else [*said, NewEvent(warning, level="warn")])
    _supersede(session, job)
    return Submission(job, replayed=False, warning=warning)


def refuse_out_of_bounds(queue: Queue, caller: Caller) -> None:
    """Raises Forbidden for a tier or a priority that the caller's key may not ask for."""
    if RANK[queue.tier] < RANK[caller.max_tier]:  # type: ignore[index]  # text in the row; the door keeps it in the set
        raise Forbidden(
            f"This API key may submit in tier '{caller.max_tier}' or below, not in '{queue.tier}'.",
            param="tunepool.queue.tier",
            code="tier_not_allowed",
        )
    if queue.priority > caller.max_priority:
        raise Forbidden(
            f"This API key may ask for priorities up to {caller.max_priority}, not {queue.priority}.",
            param="tunepool.queue.priority",
            code="priority_not_allowed",
        )


def _earlier(
    session: Session, caller: Caller, request_sha256: str, *, retried: bool, idempotency_key: str | None
) -> JobRow | None:
    if idempotency_key is not None:
        jobs.one_at_a_time(session, f"idempotency:{caller.key_id}:{idempotency_key}")
        kept = session.get(IdempotencyRow, (caller.key_id, idempotency_key))
        if kept is None:
            return None
        if kept.request_sha256 != request_sha256:
            raise Conflict(
                "This Idempotency-Key was already used with another request body. Use a new key for a new request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return session.get_one(JobRow, kept.job_id)
    if not retried:
        return None
    return session.scalars(
        select(JobRow)
        .where(
            JobRow.key_id == caller.key_id,
            JobRow.request_sha256 == request_sha256,
            JobRow.created_at > func.now() - RETRY_WINDOW,
        )
        .order_by(JobRow.id.desc())
        .limit(1)
    ).one_or_none()


def _usable_file(session: Session, caller: Caller, file_id: str, *, param: str) -> FileRow:
    # The share lock keeps a delete from slipping between this look and the job's insert.
    row = session.scalars(select(FileRow).where(FileRow.id == file_id).with_for_update(read=True)).one_or_none()
    if row is None or row.project_id != caller.project_id or row.deleted_at is not None:
        raise Invalid(
            f"{param} '{file_id[:100]}' does not exist in this project. Upload it with POST /v1/files.",
            param=param,
            code="file_not_found",
        )
    if row.purpose != "fine-tune":
        raise Invalid(
            f"{param} '{file_id}' has purpose '{row.purpose}'; a job needs a file of purpose 'fine-tune'.",
            param=param,
            code="invalid_file",
        )
    if row.status == "error":
        raise Invalid(f"{param} '{file_id}' failed its check: {row.status_details}", param=param, code="invalid_file")
    return row


def _refuse_when_full(session: Session, project: ProjectRow, key: ApiKeyRow) -> None:
    if project.max_queued is not None:
        _refuse_more(session, JobRow.project_id == project.id, project.max_queued, whose=f"Project '{project.name}'")
    if key.max_queued is not None:
        _refuse_more(session, JobRow.key_id == key.id, key.max_queued, whose=f"The API key '{key.name}'")


def _refuse_more(session: Session, theirs: ColumnElement[bool], limit: int, *, whose: str) -> None:
    waiting = session.scalar(select(func.count()).where(theirs, JobRow.status.in_(["queued", "validating_files"]))) or 0
    if waiting >= limit:
        raise LimitReached(
            f"{whose} already has {waiting} waiting jobs; its limit is {limit}. "
            "Wait, cancel some, or ask for a higher limit.",
            code="queue_full",
        )


def _new_job(request: CreateJob, *, caller: Caller, base: BaseModelRef, request_sha256: str) -> JobRow:
    queue = request.tunepool.queue
    return JobRow(
        id=new_id("ftjob-"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        status="validating_files",
        model=request.model,
        base_model=base.name,
        suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        training_file=request.training_file,
        validation_file=request.validation_file,
        request=request.model_dump(mode="json", exclude_unset=True),
        request_sha256=request_sha256,
        job_metadata=request.metadata,
        tier=queue.tier if queue else "normal",
        priority=queue.priority if queue else 0,
        preemptible=queue.preemptible if queue else True,
        max_runtime_seconds=queue.max_runtime_seconds if queue else None,
        group_name=queue.group if queue else None,
    )


def _supersede(session: Session, job: JobRow) -> None:
    queue = CreateJob.model_validate(job.request).tunepool.queue
    if queue is None or not queue.supersede or queue.group is None:
        return
    older = session.scalars(
        select(JobRow.id).where(
            JobRow.project_id == job.project_id,
            JobRow.group_name == queue.group,
            JobRow.id < job.id,
            JobRow.status.in_(["validating_files", "queued", "paused"]),
        )
    ).all()
    for job_id in older:
        jobs.cancel_waiting(session, job_id, reason=f"Superseded by {job.id} of group '{queue.group}'")
