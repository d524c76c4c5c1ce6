"""What a due schedule does: one transaction writes the job, the run with its verdict, and the next moment, or nothing.

A process that dies at any moment leaves either all or none of it. Of two that try at once the second waits for the
schedule's row and then sees that nothing is due; the unique row of schedule and moment decides in any case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, Final, Literal

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import failpoints
from shared.chores import schedules, starting
from shared.chores.starting import Sessions
from shared.contract.job_request import CreateJob
from shared.contract.parent_model import ParentModel
from shared.contract.schedule import ScheduledJob
from shared.contract.spec import BaseModelRef
from shared.errors import Conflict, Forbidden, Invalid, NotFound, NotYet, TunepoolError
from shared.ids import new_id
from shared.jobs import moves, submission
from shared.lease import outbox
from shared.settings import Settings
from shared.settle import moments
from shared.store.lifecycle import UNFINISHED
from shared.store.tables import AdapterRow, ApiKeyRow, FileRow, JobRow, ScheduleRow, ScheduleRunRow
from shared.tenants import keys
from shared.tenants.keys import Caller

Cause = Literal["cron", "change", "by_hand"]
# So long a base model may be looked up before the run is refused.
PATIENCE: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What the job of a run begins with, as it stood just before; or why there is nothing to begin with."""

    schedule_id: str
    base: BaseModelRef | None = None
    parent: ParentModel | None = None
    refusal: TunepoolError | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class DueMoment:
    """`missed`: earlier moments that nobody was there for, which this one stands for."""

    at: datetime
    cause: Cause
    next_at: datetime | None
    file: FileRow | None  # the newest of the prefix
    missed: int = 0


@dataclass(frozen=True, slots=True)
class RunVerdict:
    verdict: Literal["started", "skipped", "refused"]
    reason: str
    code: str | None = None
    job_id: str | None = None
    content: str | None = None


def prepared(
    sessions: Sessions,
    settings: Settings,
    schedule_id: str,
    *,
    by_hand: bool = False,
    force: bool = False,
    traceparent: str | None = None,
) -> Callable[[Session], ScheduleRunRow | None]:
    """What is to be done in one transaction. It returns the run, or None where nothing is due any more.

    Args:
        by_hand: whatever the clock and the data say.
        force: also where nothing has changed.
        traceparent: of the span of the request that asks for it by hand.
    """
    beginning = replace(_beginning(sessions, settings, schedule_id), traceparent=traceparent)

    def carry_out(session: Session) -> ScheduleRunRow | None:
        row = session.scalars(
            select(ScheduleRow)
            .where(ScheduleRow.id == schedule_id)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if row is None or row.deleted_at is not None:
            return None
        moment = _moment(session, row, by_hand=by_hand)
        if moment is None or _is_being_prepared(beginning, moment, now=_now(session)):
            return None
        if _has_run(session, row, moment):
            _pass(row, moment)
            return None
        run = _recorded(session, row, moment, _verdict(session, row, moment, beginning, force=force))
        failpoints.reach("schedule_before_commit", settings)
        return run

    return carry_out


def _beginning(sessions: Sessions, settings: Settings, schedule_id: str) -> RunInputs:
    """Sessions of its own: what is looked up stays asked for, whatever becomes of the run."""
    with sessions() as session:
        row = session.get(ScheduleRow, schedule_id)
        if row is None:
            return RunInputs(schedule_id, refusal=NotFound("The schedule has been deleted."))
        model, project_id = str(row.request["model"]), row.project_id
    try:
        base, parent = starting.start(sessions, settings, model, project_id=project_id)
    except (Invalid, NotFound, Conflict, NotYet) as error:
        return RunInputs(schedule_id, refusal=error)
    return RunInputs(schedule_id, base, parent)


def _is_being_prepared(beginning: RunInputs, moment: DueMoment, *, now: datetime) -> bool:
    """Whether the base model is just being looked up: then the moment stays due. By hand nobody waits."""
    late = now - moment.at > PATIENCE
    return isinstance(beginning.refusal, NotYet) and moment.cause != "by_hand" and not late


def _moment(session: Session, row: ScheduleRow, *, by_hand: bool) -> DueMoment | None:
    now = _now(session)
    file = schedules.newest_file(session, project_id=row.project_id, prefix=row.data_prefix)
    if by_hand:
        return DueMoment(now, "by_hand", row.next_at, file)
    if row.paused_at is not None:
        return None
    return _change(session, row, file) if row.cron is None else _tick(row, row.cron, file, now=now)


def _tick(row: ScheduleRow, cron: str, file: FileRow | None, *, now: datetime) -> DueMoment | None:
    if row.next_at is None or row.next_at > now:
        return None
    latest, missed, following = moments.due(cron, row.time_zone, since=row.next_at, now=now)
    return DueMoment(latest, "cron", following, file, missed)


def _change(session: Session, row: ScheduleRow, file: FileRow | None) -> DueMoment | None:
    if file is None or file.id <= (row.seen_file or ""):
        return None
    if row.overlap == "skip" and _going(session, row):
        return None  # the change waits; of several the newest counts
    return DueMoment(file.created_at, "change", None, file)


def _has_run(session: Session, row: ScheduleRow, moment: DueMoment) -> bool:
    """Whether the moment has its run already: a clock or a database that went back asks for it once more."""
    same = select(ScheduleRunRow.id).where(ScheduleRunRow.schedule_id == row.id, ScheduleRunRow.due_at == moment.at)
    return session.scalars(same).one_or_none() is not None


def _pass(row: ScheduleRow, moment: DueMoment) -> None:
    row.next_at = moment.next_at
    row.seen_file = row.seen_file if moment.file is None else moment.file.id


def _verdict(session: Session, row: ScheduleRow, moment: DueMoment, beginning: RunInputs, *, force: bool) -> RunVerdict:
    """What became of it. A refusal leaves nothing behind but its words."""
    try:
        with session.begin_nested():
            return _started(session, row, moment, beginning, force=force)
    except TunepoolError as error:
        return RunVerdict("refused", error.message, error.code)


def _started(session: Session, row: ScheduleRow, moment: DueMoment, beginning: RunInputs, *, force: bool) -> RunVerdict:
    """Raises whatever a submission does, and what `RunInputs` was refused with."""
    if beginning.refusal is not None:
        raise beginning.refusal
    assert beginning.base is not None
    caller = _caller(session, row)
    request = _request(row, moment.file)
    content = _content(session, request, beginning.base, beginning.parent)
    same = None if force or not row.skip_unchanged else _same(session, row, content)
    if same is not None:
        return RunVerdict("skipped", f"Nothing changed since {same}.", "unchanged", content=content)
    going = _going(session, row)
    if going and row.overlap == "skip":
        return RunVerdict(
            "skipped", f"The job of an earlier run, {going[0]}, has not ended.", "overlap", content=content
        )
    made = submission.submit(
        session,
        request,
        caller=caller,
        base=beginning.base,
        parent=beginning.parent,
        request_sha256=content,
        traceparent=beginning.traceparent,
    )
    if going and row.overlap == "supersede":
        _supersede(session, row, going, made.job.id)
    return RunVerdict("started", f"Started {made.job.id}.", job_id=made.job.id, content=content)


def _caller(session: Session, row: ScheduleRow) -> Caller:
    """The key that made the schedule, with the rights that it has now. Raises Forbidden when it has ended."""
    owner = session.execute(keys.OWNERS.where(ApiKeyRow.id == row.key_id)).one_or_none()
    if owner is None:
        raise Forbidden(
            f"The key that made this schedule, {row.key_id}, is revoked or expired. Make the schedule again with "
            "another one.",
            code="schedule_key_ended",
        )
    caller = keys.caller_of(owner._mapping)
    caller.must("jobs:write")
    return caller


def _request(row: ScheduleRow, file: FileRow | None) -> CreateJob:
    """The job on the data of now. Raises Invalid when there is none, or when this version takes no such job."""
    training_file = row.request.get("training_file")
    if row.data_prefix is not None:
        if file is None:
            raise Invalid(f"The project has no file whose name begins with '{row.data_prefix}'.", code="file_not_found")
        training_file = file.id
    try:
        return ScheduledJob.model_validate(row.request).on(str(training_file), metadata={schedules.LABEL: row.name})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Invalid(f"This version takes the schedule's job no more: {place}: {first['msg']}.") from None


def _content(session: Session, request: CreateJob, base: BaseModelRef, parent: ParentModel | None) -> str:
    """Of data, base, settings and the server's version, as `tunepool run` means it."""
    named = {"training_file": request.training_file, "validation_file": request.validation_file}
    ids = [file_id for file_id in named.values() if file_id is not None]
    hashes = dict(session.execute(select(FileRow.id, FileRow.sha256).where(FileRow.id.in_(ids))).all())
    facts: dict[str, Any] = {
        "server": version("tunepool-server"),
        "base": [base.name, base.revision],
        "parent": None if parent is None else parent.id,
        "data": {param: hashes.get(file_id or "") for param, file_id in named.items()},
        "job": request.model_dump(mode="json", exclude_unset=True, exclude={*named, "metadata"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _same(session: Session, row: ScheduleRow, content: str) -> str | None:
    """The newest job of this schedule and content that has neither failed nor lost its adapter."""
    query = (
        select(JobRow.id)
        .join(ScheduleRunRow, ScheduleRunRow.job_id == JobRow.id)
        .outerjoin(AdapterRow, AdapterRow.job_id == JobRow.id)
        .where(
            ScheduleRunRow.schedule_id == row.id,
            ScheduleRunRow.content == content,
            JobRow.status.not_in(["failed", "cancelled"]),
            AdapterRow.deleted_at.is_(None),
        )
    )
    return session.scalars(query.order_by(JobRow.id.desc()).limit(1)).one_or_none()


def _going(session: Session, row: ScheduleRow) -> list[str]:
    """Jobs of earlier runs that have not ended, newest first."""
    query = select(JobRow.id).join(ScheduleRunRow, ScheduleRunRow.job_id == JobRow.id)
    mine = query.where(ScheduleRunRow.schedule_id == row.id, JobRow.status.in_(sorted(UNFINISHED)))
    return list(session.scalars(mine.order_by(JobRow.id.desc())))


def _supersede(session: Session, row: ScheduleRow, older: list[str], newer: str) -> None:
    reason = f"Superseded by {newer} of the schedule '{row.name}'"
    moves.cancel_all_waiting(session, older, reason=reason, superseded_by=newer)
    moves.request_cancel_of_running(session, older, reason=reason, superseded_by=newer)


def _recorded(session: Session, row: ScheduleRow, moment: DueMoment, verdict: RunVerdict) -> ScheduleRunRow:
    run = ScheduleRunRow(
        id=new_id("srun_"),
        schedule_id=row.id,
        due_at=moment.at,
        cause=moment.cause,
        verdict=verdict.verdict,
        code=verdict.code,
        reason=verdict.reason,
        missed=moment.missed,
        job_id=verdict.job_id,
        content=verdict.content,
    )
    session.add(run)
    _pass(row, moment)
    session.flush()
    session.refresh(run)
    if verdict.verdict == "refused":
        details = {"schedule": row.name, "run": run.id, "code": run.code, "reason": run.reason}
        subject = "tunepool.schedule.refused"
        outbox.announce(session, subject, row.id, project_id=row.project_id, details=details)
    return run


def _now(session: Session) -> datetime:
    return session.scalars(select(func.now())).one()
