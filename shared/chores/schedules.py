"""Verbs of schedules: made, listed, paused, removed, and which are due. What a due one does is in schedule_runs.py.

The database's clock alone says what is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import delete as remove
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from shared.contract.parent_model import ParentModel
from shared.contract.schedule import CreateSchedule
from shared.contract.spec import BaseModelRef
from shared.errors import Conflict, Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.jobs import submission
from shared.settle import moments, refusals
from shared.store import paging
from shared.store.locks import one_at_a_time
from shared.store.tables import FileRow, JobRow, ScheduleRow, ScheduleRunRow
from shared.tenants import audit
from shared.tenants.keys import Caller

MAX_SCHEDULES: Final = 100  # of a project
MAX_DUE: Final = 200  # in one pass
LABEL: Final = "tunepool_schedule"  # metadata of the jobs that a schedule starts
MAX_METADATA: Final = 15  # OpenAI's sixteen, without ours
KEPT_DAYS: Final = 90  # runs that started nothing
FUTURE_FILE: Final = "file-of-a-later-run"


def create(
    session: Session, wanted: CreateSchedule, caller: Caller, *, base: BaseModelRef, parent: ParentModel | None
) -> ScheduleRow:
    """A schedule. Its job would be accepted now if the project has room. Data that is there is no change.

    Raises:
        Invalid, NotFound, Forbidden, Conflict: as for the job, and for name, cron and time zone.
        LimitReached: the project has `MAX_SCHEDULES`.
    """
    now = session.scalars(select(func.now())).one()
    _refuse_without_trigger(wanted)
    moments.must_be_zone(wanted.time_zone)
    next_at = None if wanted.cron is None else moments.must_be_cron(wanted.cron, wanted.time_zone, now=now)
    seen = newest_file(session, project_id=caller.project_id, prefix=wanted.data_prefix)
    _refuse_bad_job(session, wanted, caller, seen=seen, base=base, parent=parent)
    one_at_a_time(session, f"schedules:{caller.project_id}")
    _refuse_taken(session, wanted.name, project_id=caller.project_id)
    row = ScheduleRow(
        id=new_id("sched_"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        name=wanted.name,
        cron=wanted.cron,
        time_zone=wanted.time_zone,
        data_prefix=wanted.data_prefix,
        request=wanted.job.model_dump(mode="json", exclude_unset=True),
        overlap=wanted.overlap,
        skip_unchanged=wanted.skip_unchanged,
        next_at=next_at,
        seen_file=None if seen is None else seen.id,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    audit.record(session, caller, "schedule.create", row.id, after=_facts(row))
    return row


def _refuse_without_trigger(wanted: CreateSchedule) -> None:
    if wanted.cron is None and wanted.data_prefix is None:
        raise Invalid("A schedule needs 'cron', 'data_prefix' or both: nothing would start it.", param="cron")
    if (wanted.job.training_file is None) == (wanted.data_prefix is None):
        raise Invalid(
            "Give either 'job.training_file', one file for every run, or 'data_prefix', the newest file of each run.",
            param="job.training_file",
        )
    if len(wanted.job.metadata or {}) > MAX_METADATA:
        raise Invalid(
            f"'job.metadata' has room for {MAX_METADATA} entries: '{LABEL}' is added to them.", param="job.metadata"
        )


def _refuse_bad_job(
    session: Session,
    wanted: CreateSchedule,
    caller: Caller,
    *,
    seen: FileRow | None,
    base: BaseModelRef,
    parent: ParentModel | None,
) -> None:
    """By the code that accepts jobs. Data that is not there yet is looked at by the run."""
    training_file = wanted.job.training_file or (FUTURE_FILE if seen is None else seen.id)
    request = wanted.job.on(training_file, metadata={LABEL: wanted.name})
    if training_file == FUTURE_FILE:
        refusals.check_request(request, base, parent)
        return
    submission.refuse_unfit(session, request, caller=caller, base=base, parent=parent)


def _refuse_taken(session: Session, name: str, *, project_id: str) -> None:
    mine = select(ScheduleRow.name).where(ScheduleRow.project_id == project_id, ScheduleRow.deleted_at.is_(None))
    names = set(session.scalars(mine))
    if name in names:
        raise Conflict(f"This project has a schedule '{name}' already.", param="name", code="schedule_exists")
    if len(names) >= MAX_SCHEDULES:
        raise LimitReached(
            f"A project has {MAX_SCHEDULES} schedules at the most; delete one first.", code="too_many_schedules"
        )


def newest_file(session: Session, *, project_id: str, prefix: str | None) -> FileRow | None:
    """The project's newest training file whose name begins with `prefix`."""
    if prefix is None:
        return None
    query = select(FileRow).where(
        FileRow.project_id == project_id,
        FileRow.deleted_at.is_(None),
        FileRow.purpose == "fine-tune",
        FileRow.filename.startswith(prefix, autoescape=True),
    )
    return session.scalars(query.order_by(FileRow.id.desc()).limit(1)).one_or_none()


def due(session: Session) -> Sequence[str]:
    """Ids of schedules whose moment has come or whose data may have changed, longest due first."""
    changed = (
        select(FileRow.id)
        .where(
            FileRow.project_id == ScheduleRow.project_id,
            FileRow.deleted_at.is_(None),
            FileRow.purpose == "fine-tune",
            FileRow.id > func.coalesce(ScheduleRow.seen_file, ""),
            func.starts_with(FileRow.filename, ScheduleRow.data_prefix),
        )
        .exists()
    )
    query = select(ScheduleRow.id).where(
        ScheduleRow.deleted_at.is_(None),
        ScheduleRow.paused_at.is_(None),
        or_(ScheduleRow.next_at <= func.now(), ScheduleRow.cron.is_(None) & changed),
    )
    return session.scalars(query.order_by(ScheduleRow.next_at, ScheduleRow.id).limit(MAX_DUE)).all()


def find(session: Session, name: str, *, project_id: str, lock: bool = False) -> ScheduleRow:
    """The schedule of that id or name. Raises NotFound."""
    query = select(ScheduleRow).where(
        ScheduleRow.project_id == project_id,
        ScheduleRow.deleted_at.is_(None),
        or_(ScheduleRow.id == name, ScheduleRow.name == name),
    )
    query = query.order_by((ScheduleRow.id == name).desc()).limit(1)
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"No schedule '{name[:100]}' in this project.", param="schedule")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[ScheduleRow], bool]:
    """Schedules of a project by name, and whether more follow. `after`: the last name of the page before."""
    query = select(ScheduleRow).where(ScheduleRow.project_id == project_id, ScheduleRow.deleted_at.is_(None))
    return paging.page(session, query, ScheduleRow.name, after=after, limit=limit, order="asc")


def runs(
    session: Session, schedule: ScheduleRow, *, after: str | None = None, limit: int
) -> tuple[Sequence[tuple[ScheduleRunRow, str | None]], bool]:
    """Runs with the status of their jobs, newest first, and whether more follow."""
    query = select(ScheduleRunRow, JobRow.status).outerjoin(JobRow, JobRow.id == ScheduleRunRow.job_id)
    mine = ScheduleRunRow.schedule_id == schedule.id
    rows = session.execute(paging.behind(query.where(mine), ScheduleRunRow.id, after=after, limit=limit))
    return paging.cut([(run, status) for run, status in rows], limit)


def pause(session: Session, name: str, caller: Caller) -> ScheduleRow:
    """Start nothing more; what runs runs on. Paused already is fine. Raises NotFound."""
    row = find(session, name, project_id=caller.project_id, lock=True)
    if row.paused_at is None:
        row.paused_at, row.next_at = _now(session), None
        audit.record(session, caller, "schedule.pause", row.id)
    return row


def resume(session: Session, name: str, caller: Caller) -> ScheduleRow:
    """Go on from now: moments and changes of the pause are not made up for. Raises NotFound."""
    row = find(session, name, project_id=caller.project_id, lock=True)
    if row.paused_at is not None:
        seen = newest_file(session, project_id=row.project_id, prefix=row.data_prefix)
        row.paused_at = None
        row.seen_file = row.seen_file if seen is None else seen.id
        row.next_at = following(row, after=_now(session))
        audit.record(session, caller, "schedule.resume", row.id)
    return row


def following(row: ScheduleRow, *, after: datetime) -> datetime | None:
    """When it is due next by the clock."""
    return None if row.cron is None else moments.next_moment(row.cron, row.time_zone, after=after)


def delete(session: Session, name: str, caller: Caller) -> ScheduleRow:
    """Remove a schedule; the jobs that it has started stay. Raises NotFound."""
    row = find(session, name, project_id=caller.project_id, lock=True)
    row.deleted_at = _now(session)
    audit.record(session, caller, "schedule.delete", row.id, before=_facts(row))
    return row


def forget(session: Session, *, limit: int = 10_000) -> None:
    """Remove old runs that started nothing."""
    old = select(ScheduleRunRow.id).where(
        ScheduleRunRow.job_id.is_(None), ScheduleRunRow.created_at < func.now() - func.make_interval(0, 0, 0, KEPT_DAYS)
    )
    session.execute(remove(ScheduleRunRow).where(ScheduleRunRow.id.in_(old.limit(limit))))


def _now(session: Session) -> datetime:
    return session.scalars(select(func.now())).one()


def _facts(row: ScheduleRow) -> dict[str, Any]:
    return {"name": row.name, "cron": row.cron, "time_zone": row.time_zone, "data_prefix": row.data_prefix}
