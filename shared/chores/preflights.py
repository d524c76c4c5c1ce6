"""Verbs of preflights: what a job would do, asked without submitting it. An examination is a lease with a number."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.orm import Session

from shared.contract.spec import DEFAULT_PREVIEW_ROWS, BaseModelRef, CreateJob, CreatePreflight
from shared.errors import Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.lease.values import FileRef, ends_in
from shared.store.tables import FileRow, PreflightRow
from shared.tenants.keys import Caller

# A preflight that ended this many workers is not begun again: it would end the next one too.
MAX_CHECKS: Final = 3
MAX_WAITING: Final = 100  # of one project
KEPT: Final = timedelta(days=30)
OPEN: Final = ("queued", "running")


@dataclass(frozen=True, slots=True)
class PreflightClaim:
    """What an examination needs to know. `number` fences off an examiner that was thought dead."""

    id: str
    number: int
    request: CreateJob
    preview_rows: tuple[int, ...]
    base_model: str
    seed: int
    training_file: FileRef
    validation_file: FileRef | None


def create(session: Session, wanted: CreatePreflight, *, caller: Caller, base: BaseModelRef) -> PreflightRow:
    """Accept a preflight; it waits until its files are checked. Raises Invalid, LimitReached."""
    _must_exist(session, caller, wanted.training_file, param="training_file")
    if wanted.validation_file is not None:
        _must_exist(session, caller, wanted.validation_file, param="validation_file")
    waiting = session.scalar(
        select(func.count()).where(PreflightRow.project_id == caller.project_id, PreflightRow.status.in_(OPEN))
    )
    if (waiting or 0) >= MAX_WAITING:
        raise LimitReached(f"The project already has {waiting} waiting preflights; wait for some.", code="queue_full")
    row = PreflightRow(
        id=new_id("preflight_"),
        project_id=caller.project_id,
        status="queued",
        base_model=base.name,
        seed=wanted.seed if wanted.seed is not None else secrets.randbelow(2**31),
        training_file=wanted.training_file,
        validation_file=wanted.validation_file,
        request=wanted.model_dump(mode="json", exclude_unset=True),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _must_exist(session: Session, caller: Caller, file_id: str, *, param: str) -> None:
    row = session.get(FileRow, file_id)
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


def find(session: Session, preflight_id: str, *, project_id: str) -> PreflightRow:
    """A preflight of this project. Raises NotFound."""
    row = session.get(PreflightRow, preflight_id)
    if row is None or row.project_id != project_id:
        raise NotFound(f"No such preflight: {preflight_id[:100]}", param="preflight_id")
    return row


def page(
    session: Session, *, project_id: str, after: str | None, limit: int, status: str | None
) -> tuple[Sequence[PreflightRow], bool]:
    """Newest first, and whether more follow."""
    query = select(PreflightRow).where(PreflightRow.project_id == project_id)
    if status is not None:
        query = query.where(PreflightRow.status == status)
    if after is not None:
        query = query.where(PreflightRow.id < after)
    rows = session.scalars(query.order_by(PreflightRow.id.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


# --- the examiner's -------------------------------------------------------------------------------------------------


def ready() -> ColumnElement[bool]:
    """Those that nobody works on and whose files are checked."""
    unchecked = select(FileRow.id).where(
        FileRow.id.in_([PreflightRow.training_file, PreflightRow.validation_file]),
        FileRow.status == "uploaded",
        FileRow.deleted_at.is_(None),
    )
    return (
        PreflightRow.status.in_(OPEN)
        & or_(PreflightRow.check_until.is_(None), PreflightRow.check_until < func.now())
        & ~unchecked.correlate(PreflightRow).exists()
    )


def claim(session: Session, *, lease_seconds: float) -> PreflightClaim | None:
    """Lease the oldest preflight that is ready, or None."""
    _give_up(session)
    candidate = (
        select(PreflightRow.id)
        .where(ready())
        .order_by(PreflightRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = session.execute(
        update(PreflightRow)
        .where(PreflightRow.id == candidate)
        .values(
            status="running",
            checker=PreflightRow.checker + 1,
            check_until=ends_in(lease_seconds),
        )
        .returning(PreflightRow)
    ).scalar_one_or_none()
    return None if row is None else _claim(session, row)


def _claim(session: Session, row: PreflightRow) -> PreflightClaim:
    wanted = CreatePreflight.model_validate(row.request)
    return PreflightClaim(
        id=row.id,
        number=row.checker,
        request=wanted.job(),
        preview_rows=DEFAULT_PREVIEW_ROWS if wanted.preview_rows is None else tuple(wanted.preview_rows),
        base_model=row.base_model,
        seed=row.seed,
        training_file=_file_ref(session, row.training_file),
        validation_file=None if row.validation_file is None else _file_ref(session, row.validation_file),
    )


def _file_ref(session: Session, file_id: str) -> FileRef:
    return FileRef.of(session.get_one(FileRow, file_id))


def keep(session: Session, held: PreflightClaim, *, lease_seconds: float) -> bool:
    """Extend the lease. False: somebody else has the preflight now."""
    return _write(session, held, check_until=ends_in(lease_seconds))


def finish(session: Session, held: PreflightClaim, report: dict[str, Any]) -> bool:
    """running -> succeeded: the questions are answered, whatever the answers are. False: fenced off."""
    return _write(session, held, status="succeeded", report=report, check_until=None, finished_at=func.now())


def fail(session: Session, held: PreflightClaim, *, code: str, message: str) -> bool:
    """running -> failed: there is no answer. False: fenced off."""
    error = {"code": code, "message": message, "param": None}
    return _write(session, held, status="failed", error=error, check_until=None, finished_at=func.now())


def release(session: Session, held: PreflightClaim) -> bool:
    """Give the preflight back untouched (the store was away, the worker stops)."""
    return _write(session, held, status="queued", check_until=None, checker=PreflightRow.checker - 1)


def _write(session: Session, held: PreflightClaim, **values: Any) -> bool:
    found = session.execute(
        update(PreflightRow)
        .where(PreflightRow.id == held.id, PreflightRow.status == "running", PreflightRow.checker == held.number)
        .values(**values)
        .returning(PreflightRow.id)
    ).one_or_none()
    return found is not None


def _give_up(session: Session) -> None:
    message = f"Examining these files ended {MAX_CHECKS} workers. Look for extreme rows."
    session.execute(
        update(PreflightRow)
        .where(
            PreflightRow.status == "running",
            PreflightRow.checker >= MAX_CHECKS,
            PreflightRow.check_until < func.now(),
        )
        .values(
            status="failed",
            error={"code": "preflight_lost", "message": message, "param": None},
            check_until=None,
            finished_at=func.now(),
        )
    )


def forget(session: Session) -> None:
    """Drop what was answered a month ago."""
    session.execute(
        delete(PreflightRow).where(PreflightRow.finished_at < func.now() - KEPT, PreflightRow.status.not_in(OPEN))
    )
