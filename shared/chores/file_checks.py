"""Verbs of the file check: who reads which file, and what was found. A check is a lease (shared/lease)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, or_
from sqlalchemy.orm import Session

from shared.lease import lease as leasing
from shared.lease import turns
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import ChoreTurn, Work
from shared.lease.values import Lease
from shared.store.tables import FileRow

FILE_CHECK: Final = Kind(
    name="file_check",
    row=FileRow,
    open=(FileRow.status == "uploaded") & FileRow.deleted_at.is_(None),
    lost={
        "status": "error",
        "status_details": f"Reading this file ended {MAX_FAILURES} workers. Look for extreme lines or nesting.",
    },
    cancelled={"status": "error", "status_details": "The check of this file was cancelled. Upload it again."},
)
# By its name where the upload went to a version that did not look into it.
_IS_TABLE: Final = func.coalesce(
    FileRow.packed, or_(FileRow.filename.iendswith(".csv"), FileRow.filename.iendswith(".parquet"))
)
# What is no JSONL as it stands is opened by a program, which may take minutes. Lines of JSON are read at once.
LINES: Final = Work(FILE_CHECK, which=~_IS_TABLE)
TABLES: Final = Work(FILE_CHECK, which=_IS_TABLE, long=True)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The right to say what a file is; `lease.id` is the file's id. `packed`: it is no JSONL as it stands."""

    lease: Lease
    project_id: str
    filename: str
    key: str
    bytes: int
    sha256: str
    packed: bool


def claim_check(
    session: Session,
    *,
    worker_id: str,
    lease_seconds: float,
    work: Work = LINES,
    turn: ChoreTurn | None = None,
    passed_over: Collection[str] = (),
) -> FileCheck | None:
    """Lease the next complete upload of `work` (LINES or TABLES) that nobody is reading, or None."""
    row = turns.take(
        session,
        FILE_CHECK,
        worker_id=worker_id,
        turn=turn,
        where=() if work.which is None else (work.which,),
        lease_seconds=lease_seconds,
        passed_over=passed_over,
    )
    if row is None:
        return None
    return FileCheck(
        lease=FILE_CHECK.lease(row),
        project_id=row.project_id,
        filename=row.filename,
        key=row.key,
        bytes=row.bytes,
        sha256=row.sha256,
        packed=work is TABLES,
    )


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
    return leasing.end(
        session,
        FILE_CHECK,
        check.lease,
        status="error" if problem else "processed",
        status_details=problem,
        report=report,
        rows_key=rows.key if rows else None,
        rows_sha256=rows.sha256 if rows else None,
    )
