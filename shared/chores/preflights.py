"""Verbs of preflights: what a job would do, asked without submitting it. An examination is a lease (shared/lease)."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Unpack

from pydantic import ValidationError
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from shared.chores import failing
from shared.contract.documents import error_document
from shared.contract.job_request import DEFAULT_PREVIEW_ROWS, CreateJob, CreatePreflight
from shared.contract.parent_model import ParentModel
from shared.contract.spec import BaseModelRef
from shared.errors import Conflict, LimitReached, NotFound
from shared.ids import new_id
from shared.jobs import integrations, parents
from shared.lease import lease as leasing
from shared.lease import turns
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Claiming, Work
from shared.lease.values import FileRef, Lease, WrittenByNewerVersion
from shared.products.files import usable
from shared.settle import going_on, refusals
from shared.store import paging
from shared.store.tables import FileRow, PreflightRow
from shared.tenants.keys import Caller

MAX_WAITING: Final = 100  # of one project
KEPT: Final = timedelta(days=30)
OPEN: Final = ("queued", "running")

_UNCHECKED: Final = select(FileRow.id).where(
    FileRow.id.in_([PreflightRow.training_file, PreflightRow.validation_file]),
    FileRow.status == "uploaded",
    FileRow.deleted_at.is_(None),
)
PREFLIGHT: Final = Kind(
    name="preflight",
    row=PreflightRow,
    open=PreflightRow.status.in_(OPEN),
    ready=~_UNCHECKED.correlate(PreflightRow).exists(),
    taken={"status": "running", "progress": None},
    waiting={"status": "queued"},
    lost={
        "status": "failed",
        "error": error_document(
            "preflight_lost", f"Examining these files ended {MAX_FAILURES} workers. Look for extreme rows."
        ),
        "finished_at": func.now(),
    },
    cancelled=failing.failed("cancelled", "The preflight was cancelled."),
)
WORK: Final = Work(PREFLIGHT, long=True)


@dataclass(frozen=True, slots=True)
class PreflightClaim:
    """What an examination needs to know; `lease.id` is the preflight's id."""

    lease: Lease
    project_id: str
    request: CreateJob
    preview_rows: tuple[int, ...]
    base_model: str
    seed: int
    training_file: FileRef
    validation_file: FileRef | None
    parent: ParentModel | None = None  # the tuned model that the job would go on from; None too when that is withdrawn


def create(
    session: Session,
    wanted: CreatePreflight,
    *,
    caller: Caller,
    base: BaseModelRef,
    parent: ParentModel | None = None,
) -> PreflightRow:
    """Accept a preflight; it waits until its files are checked. Raises Invalid, LimitReached."""
    refusals.check_request(wanted, base, parent)
    for param, file_id in (("training_file", wanted.training_file), ("validation_file", wanted.validation_file)):
        if file_id is not None:
            usable(session.get(FileRow, file_id), project_id=caller.project_id, file_id=file_id, param=param)
    integrations.refuse_unready(session, wanted.job(), project_id=caller.project_id)
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
        request=(wanted if parent is None else going_on.marked(wanted)).model_dump(mode="json", exclude_unset=True),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def find(session: Session, preflight_id: str, *, project_id: str) -> PreflightRow:
    """A preflight of this project. Raises NotFound."""
    row = session.get(PreflightRow, preflight_id)
    if row is None or row.project_id != project_id:
        raise _not_found(preflight_id)
    return row


def _not_found(preflight_id: str) -> NotFound:
    return NotFound(f"No such preflight: {preflight_id[:100]}", param="preflight_id")


def page(
    session: Session, *, project_id: str, after: str | None, limit: int, status: str | None
) -> tuple[Sequence[PreflightRow], bool]:
    """Newest first, and whether more follow."""
    query, mine = select(PreflightRow), PreflightRow.project_id == project_id
    if status is not None:
        query = query.where(PreflightRow.status == status)
    return paging.page(session, query, PreflightRow.id, mine, after=after, limit=limit)


def cancel(session: Session, preflight_id: str, *, caller: Caller) -> PreflightRow:
    """End a preflight that has no answer yet; its program stops within a heartbeat. Raises NotFound, Conflict.

    An administrator may end those of every project.
    """
    row = session.get(PreflightRow, preflight_id)
    if row is None or not (row.project_id == caller.project_id or caller.operates):
        raise _not_found(preflight_id)
    ended: PreflightRow | None = leasing.cancel(session, PREFLIGHT, preflight_id)
    if ended is None:
        raise Conflict(
            f"Preflight '{preflight_id}' has ended already; only a queued or running one can be cancelled.",
            param="preflight_id",
            code="preflight_already_finished",
        )
    return ended


# --- the examiner's -------------------------------------------------------------------------------------------------


def claim(session: Session, **claiming: Unpack[Claiming]) -> PreflightClaim | None:
    """Lease the next preflight whose files are checked, or None. Raises WrittenByNewerVersion."""
    row = turns.take(session, PREFLIGHT, **claiming)
    return None if row is None else _claim(session, row)


def _claim(session: Session, row: PreflightRow) -> PreflightClaim:
    try:
        wanted = CreatePreflight.model_validate(row.request)
        request = wanted.job()
    except ValidationError as error:
        raise WrittenByNewerVersion(row.id) from error
    return PreflightClaim(
        lease=PREFLIGHT.lease(row),
        project_id=row.project_id,
        request=request,
        preview_rows=DEFAULT_PREVIEW_ROWS if wanted.preview_rows is None else tuple(wanted.preview_rows),
        base_model=row.base_model,
        seed=row.seed,
        training_file=_file_ref(session, row.training_file),
        validation_file=None if row.validation_file is None else _file_ref(session, row.validation_file),
        parent=_parent(session, row, request),
    )


def _parent(session: Session, row: PreflightRow, request: CreateJob) -> ParentModel | None:
    if not going_on.is_marked(request):
        return None
    try:
        return parents.find(session, request.model, project_id=row.project_id)
    except NotFound:
        return None


def _file_ref(session: Session, file_id: str) -> FileRef:
    return FileRef.of(session.get_one(FileRow, file_id))


def note(session: Session, held: PreflightClaim, **values: dict[str, Any]) -> bool:
    """Write `progress` or `sample` of a running preflight. False: fenced off."""
    return leasing.write(session, PREFLIGHT, held.lease, **values)


def finish(session: Session, held: PreflightClaim, report: dict[str, Any]) -> bool:
    """running -> succeeded: the questions are answered, whatever the answers are. False: fenced off."""
    return leasing.end(session, PREFLIGHT, held.lease, status="succeeded", report=report, finished_at=func.now())


def fail(session: Session, held: PreflightClaim, *, code: str, message: str) -> bool:
    """running -> failed: there is no answer. False: fenced off."""
    error = error_document(code, message)
    return leasing.end(session, PREFLIGHT, held.lease, status="failed", error=error, finished_at=func.now())


def forget(session: Session) -> None:
    """Drop what was answered a month ago."""
    session.execute(
        delete(PreflightRow).where(PreflightRow.finished_at < func.now() - KEPT, PreflightRow.status.not_in(OPEN))
    )
