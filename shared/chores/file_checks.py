"""Verbs of the file check: who reads which file, and what was found. A check is a lease, guarded by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from shared.lease.values import ends_in
from shared.store.tables import FileRow

# A file whose check ended this many workers is not read again: it would end the next one too.
MAX_CHECKS: Final = 3


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The right to say what a file is. `number` fences off a checker that was thought dead."""

    file_id: str
    filename: str
    key: str
    bytes: int
    sha256: str
    number: int


def claim_check(session: Session, *, lease_seconds: float) -> FileCheck | None:
    """Lease the oldest complete upload that nobody is reading, or None."""
    _give_up(session)
    candidate = (
        select(FileRow.id)
        .where(
            FileRow.status == "uploaded",
            FileRow.deleted_at.is_(None),
            FileRow.sha256 != "",  # still being uploaded
            or_(FileRow.check_until.is_(None), FileRow.check_until < func.now()),
        )
        .order_by(FileRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = session.execute(
        update(FileRow)
        .where(FileRow.id == candidate)
        .values(check_until=ends_in(lease_seconds), check_attempts=FileRow.check_attempts + 1)
        .returning(FileRow.id, FileRow.filename, FileRow.key, FileRow.bytes, FileRow.sha256, FileRow.check_attempts)
    ).one_or_none()
    return None if taken is None else FileCheck(*taken)


def keep_check(session: Session, check: FileCheck, *, lease_seconds: float) -> bool:
    """Extend the lease of a long check. False: somebody else reads the file now."""
    return _write(session, check, check_until=ends_in(lease_seconds))


@dataclass(frozen=True, slots=True)
class MadeRows:
    """The JSONL that the check made of a file in another format; its bytes are in the store already."""

    key: str
    sha256: str


def finish_check(
    session: Session,
    check: FileCheck,
    *,
    report: dict[str, Any] | None,
    problem: str | None = None,
    rows: MadeRows | None = None,
) -> bool:
    """uploaded -> processed, or -> error with a sentence for the user. False: fenced off, or deleted meanwhile."""
    return _write(
        session,
        check,
        status="error" if problem else "processed",
        status_details=problem,
        report=report,
        rows_key=rows.key if rows else None,
        rows_sha256=rows.sha256 if rows else None,
        check_until=None,
    )


def release_check(session: Session, check: FileCheck) -> bool:
    """Give the file back unread (the store was away); it counts as no attempt."""
    return _write(session, check, check_until=None, check_attempts=FileRow.check_attempts - 1)


def _write(session: Session, check: FileCheck, **values: Any) -> bool:
    found = session.execute(
        update(FileRow)
        .where(FileRow.id == check.file_id, FileRow.status == "uploaded", FileRow.check_attempts == check.number)
        .values(**values)
        .returning(FileRow.id)
    ).one_or_none()
    return found is not None


def _give_up(session: Session) -> None:
    session.execute(
        update(FileRow)
        .where(
            FileRow.status == "uploaded",
            FileRow.check_attempts >= MAX_CHECKS,
            FileRow.check_until < func.now(),
        )
        .values(
            status="error",
            status_details=f"Reading this file ended {MAX_CHECKS} workers. Look for extreme lines or nesting.",
            check_until=None,
        )
    )
