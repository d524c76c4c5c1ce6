"""Accepting a job: the files it names, the project's room, and the request that was already made once."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import ColumnElement, TextClause, bindparam, func, inspect, select, text
from sqlalchemy.orm import Session, make_transient_to_detached

from shared.contract.job_request import CreateJob, chosen
from shared.contract.parent_model import ParentModel
from shared.contract.spec import BaseModelRef, Queue
from shared.errors import Conflict, Forbidden, Invalid, LimitReached
from shared.ids import new_id
from shared.jobs import integrations, moves, parents
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.plan.preemption import RANK
from shared.products.files import usable
from shared.settle import going_on, refusals
from shared.store.locks import one_at_a_time, turn
from shared.store.tables import ApiKeyRow, FileRow, IdempotencyRow, JobRow, ProjectRow
from shared.tenants import usage
from shared.tenants.keys import Caller

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
    parent: ParentModel | None = None,
    retried: bool = False,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> Submission:
    """Accept a job, or return the one that this request has already made.

    `base` is the parent's where there is one: a tuned model that the job goes on from.
    `retried`: the client says this is a retry of a POST whose answer it never saw; the same body under the same key
    within ten minutes is then the same job. `traceparent`: of the request's span, in W3C's form.

    Raises Invalid, NotFound, Conflict, Forbidden, LimitReached.
    """
    refusals.check_request(request, base, parent)
    own_turn = f"submit:{caller.key_id}:{request_sha256}"
    if retried or idempotency_key is not None:
        one_at_a_time(session, own_turn)  # by now the earlier one is committed, or there is none
        earlier = _earlier(session, caller, request_sha256, retried=retried, idempotency_key=idempotency_key)
        if earlier is not None:
            return Submission(earlier, replayed=True)
    grounds = _grounds(session, request, caller, own_turn=own_turn)
    _refuse_when_full(session, caller, grounds[0])
    columns = _columns(request, caller=caller, base=base, request_sha256=request_sha256)
    if traceparent is not None:
        columns["traceparent"] = traceparent
    if parent is not None:
        columns |= _descent(session, request, parent)
    limited = grounds[0].budget_soft_device_seconds is not None
    warning = usage.soft_limit_warning(session, caller.project_id) if limited else None
    names = ", ".join([ground.filename for ground in grounds])
    job = _store(session, columns, _first_events(columns["id"], names=names, parent=parent, warning=warning))
    integrations.record(session, request, job)
    if idempotency_key is not None:
        session.add(
            IdempotencyRow(
                key_id=caller.key_id, idempotency_key=idempotency_key, request_sha256=request_sha256, job_id=job.id
            )
        )
    _supersede(session, job, request.tunepool.queue)
    return Submission(job, replayed=False, warning=warning)


def refuse_unfit(
    session: Session, request: CreateJob, *, caller: Caller, base: BaseModelRef, parent: ParentModel | None
) -> None:
    """What `submit` would refuse now, whatever room the project has; nothing is stored. Raises as `submit` does."""
    refusals.check_request(request, base, parent)
    _grounds(session, request, caller, own_turn=f"unfit:{caller.key_id}")


def _grounds(session: Session, request: CreateJob, caller: Caller, *, own_turn: str) -> list[Any]:
    """The files that the job would stand on. Raises Invalid, Forbidden."""
    refuse_out_of_bounds(request.tunepool.queue or Queue(), caller)
    integrations.refuse_unready(session, request, project_id=caller.project_id)
    named = {"training_file": request.training_file, "validation_file": request.validation_file}
    renamed = bool(chosen(request.tunepool.training).get("columns"))
    return [
        _ground(session, caller, file_id, own_turn=own_turn, param=param, renamed=renamed)
        for param, file_id in named.items()
        if file_id is not None
    ]


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
        one_at_a_time(session, f"idempotency:{caller.key_id}:{idempotency_key}")
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


# What a submission stands on, read in one round trip: its file, its limits, and its turn. The lock keeps a delete from
# slipping between this look and the job's insert; the insert's foreign key would take the same.
_GROUND: Final = (
    select(
        FileRow.project_id,
        FileRow.deleted_at,
        FileRow.filename,
        FileRow.purpose,
        FileRow.status,
        FileRow.status_details,
        FileRow.packed,
        FileRow.rows_key,
        ProjectRow.name.label("project_name"),
        ProjectRow.max_queued.label("project_max_queued"),
        ProjectRow.budget_soft_device_seconds,
        ApiKeyRow.name.label("key_name"),
        ApiKeyRow.max_queued.label("key_max_queued"),
        turn(bindparam("turn")),
    )
    .select_from(FileRow)
    .join(ApiKeyRow, ApiKeyRow.id == bindparam("key_id"))
    .join(ProjectRow, ProjectRow.id == ApiKeyRow.project_id)
    .where(FileRow.id == bindparam("file_id"))
    .with_for_update(read=True, key_share=True, of=FileRow)
)


def _ground(session: Session, caller: Caller, file_id: str, *, own_turn: str, param: str, renamed: bool) -> Any:
    """The file as a submission may use it, beside the limits of whoever submits. Raises Invalid.

    `renamed`: the job reads its columns under other names, so its rows are checked once more as the job is settled.
    """
    values = {"turn": own_turn, "key_id": caller.key_id, "file_id": file_id}
    row = session.connection().execute(_GROUND, values).one_or_none()
    row = usable(row, project_id=caller.project_id, file_id=file_id, param=param)
    if row.status == "error" and not (renamed and (row.rows_key is not None or not row.packed)):
        raise Invalid(f"{param} '{file_id}' failed its check: {row.status_details}", param=param, code="invalid_file")
    return row


def _refuse_when_full(session: Session, caller: Caller, ground: Any) -> None:
    project, key = f"Project '{ground.project_name}'", f"The API key '{ground.key_name}'"
    if ground.project_max_queued is not None:
        _refuse_more(session, JobRow.project_id == caller.project_id, ground.project_max_queued, whose=project)
    if ground.key_max_queued is not None:
        _refuse_more(session, JobRow.key_id == caller.key_id, ground.key_max_queued, whose=key)


def _refuse_more(session: Session, theirs: ColumnElement[bool], limit: int, *, whose: str) -> None:
    waiting = session.scalar(select(func.count()).where(theirs, JobRow.status.in_(["queued", "validating_files"]))) or 0
    if waiting >= limit:
        raise LimitReached(
            f"{whose} already has {waiting} waiting jobs; its limit is {limit}. "
            "Wait, cancel some, or ask for a higher limit.",
            code="queue_full",
        )


def _columns(request: CreateJob, *, caller: Caller, base: BaseModelRef, request_sha256: str) -> dict[str, Any]:
    """The columns of a new job that are set."""
    queue = request.tunepool.queue or Queue()
    return {
        "id": new_id("ftjob-"),
        "project_id": caller.project_id,
        "key_id": caller.key_id,
        "status": "validating_files",
        "model": request.model,
        "base_model": base.name,
        "suffix": request.suffix,
        "seed": request.seed if request.seed is not None else secrets.randbelow(2**31),
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "request": request.model_dump(mode="json", exclude_unset=True),
        "request_sha256": request_sha256,
        "auto": [],
        "job_metadata": request.metadata,
        "tier": queue.tier,
        "priority": queue.priority,
        "preemptible": queue.preemptible,
        "max_runtime_seconds": queue.max_runtime_seconds,
        "group_name": queue.group,
    }


def _descent(session: Session, request: CreateJob, parent: ParentModel) -> dict[str, Any]:
    """The columns that name the parent of a job, which is held until the job is there. Raises NotFound."""
    parents.hold(session, parent)
    kept = going_on.marked(request).model_dump(mode="json", exclude_unset=True)
    return {"parent_id": parent.id, "parent_name": parent.name, "request": kept}


def _first_events(job_id: str, *, names: str, parent: ParentModel | None, warning: str | None) -> list[NewEvent]:
    events = [NewEvent(f"Created fine-tuning job: {job_id}")]
    if parent is not None:
        events.append(NewEvent(f"It goes on from {parent.name}", data={"parent": parent.id}))
    events.append(NewEvent(f"Validating training file: {names}"))
    if warning is not None:
        events.append(NewEvent(warning, level="warn"))
    return events


_COLUMNS: Final = {name: column for name, column in inspect(JobRow).columns.items() if name != "created_at"}
_UNSAID: Final = {
    name: None if column.default is None else column.default.arg  # type: ignore[attr-defined]  # plain values, all
    for name, column in _COLUMNS.items()
}


@lru_cache(maxsize=64)
def _insertion(names: tuple[str, ...]) -> TextClause:
    """Stores a job of which these columns are set, and its first events, in one round trip; gives its `created_at`."""
    # Only the columns that are set, without a null for each other: psycopg prepares no statement of over 50 values.
    columns = ", ".join(_COLUMNS[name].key for name in names)
    values = ", ".join(f":{name}" for name in names)
    statement = text(
        f"with job as (insert into jobs ({columns}) values ({values}) returning id, created_at),"  # noqa: S608  # ours
        f" told as ({journal.OF_NEW_JOB}) select created_at from job"
    )
    return statement.bindparams(*(bindparam(name, type_=_COLUMNS[name].type) for name in names))


def _store(session: Session, columns: dict[str, Any], events: list[NewEvent]) -> JobRow:
    """Insert a new job. Only `created_at` is read back: reading the whole row costs twice the insert."""
    values = columns | journal.of_new_job(events)
    created_at = session.connection().execute(_insertion(tuple(columns)), values).scalar_one()
    job = JobRow()
    # Stored as it stands: the session has nothing to write and nothing to load. An assignment for each of sixty columns
    # would cost more than the rest of a submission.
    job.__dict__.update(_UNSAID | columns, created_at=created_at)
    make_transient_to_detached(job)
    session.add(job)
    return job


def _supersede(session: Session, job: JobRow, queue: Queue | None) -> None:
    if queue is None or not queue.supersede or queue.group is None:
        return
    older = session.scalars(
        select(JobRow.id).where(
            JobRow.project_id == job.project_id,
            JobRow.group_name == queue.group,
            JobRow.id < job.id,
            JobRow.status.in_(["validating_files", "queued", "paused", "running"]),
        )
    ).all()
    reason = f"Superseded by {job.id} of group '{queue.group}'"
    moves.cancel_all_waiting(session, older, reason=reason, superseded_by=job.id)
    if queue.supersede == "running":
        moves.request_cancel_of_running(session, older, reason=reason, superseded_by=job.id)
