"""Rows of files: uploads, and files that jobs make. Their bytes go through shared/store/storage.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid, NotFound
from shared.products import lineage
from shared.store import paging
from shared.store.lifecycle import UNFINISHED
from shared.store.tables import FileRow, JobRow


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete upload: its bytes are in the store. `packed`: they are no lines, a program makes rows of them."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    key: str
    expires_after: timedelta | None = None
    packed: bool = False


def add(session: Session, upload: Upload, *, project_id: str) -> FileRow:
    """Record an upload. A fine-tuning file waits for its check; any other is ready."""
    row = FileRow(
        project_id=project_id,
        status="uploaded" if upload.purpose == "fine-tune" else "processed",
        id=upload.id,
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=upload.bytes,
        sha256=upload.sha256,
        key=upload.key,
        packed=upload.packed,
        # By the clock that will call it expired.
        expires_at=None if upload.expires_after is None else func.now() + upload.expires_after,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def usable(row: Any, *, project_id: str, file_id: str, param: str) -> Any:
    """`row` itself, if it is a file that a job of this project may train on. Raises Invalid.

    Args:
        row: the file's row, or a selection that has its project, purpose and deletion; None where there is none.
        param: the field of the request that names the file.
    """
    if row is None or row.project_id != project_id or row.deleted_at is not None:
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
    return row


def find(session: Session, file_id: str, *, project_id: str) -> FileRow:
    """A file of this project. Raises NotFound."""
    row = session.get(FileRow, file_id)
    if row is None or row.project_id != project_id or row.deleted_at is not None:
        raise NotFound(f"No such File object: {file_id[:100]}", param="file_id")
    return row


def page(
    session: Session,
    *,
    project_id: str,
    after: str | None,
    limit: int,
    order: paging.Order,
    purpose: str | None,
    sha256: str | None = None,
) -> tuple[Sequence[FileRow], bool]:
    """Files of a project and whether more follow.

    `after` may name a file that is deleted by now: ids sort by time. Raises NotFound for one that never was.
    """
    query, mine = select(FileRow).where(FileRow.deleted_at.is_(None)), FileRow.project_id == project_id
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    if sha256 is not None:
        query = query.where(FileRow.sha256 == sha256)
    return paging.page(session, query, FileRow.id, mine, after=after, limit=limit, order=order, what="file")


def delete(session: Session, file_id: str, *, project_id: str, force: bool = False) -> FileRow:
    """Mark a file deleted; its bytes go when no transaction can still need them. Raises NotFound, Conflict.

    Args:
        force: also where the model of an alias was made of it. An unfinished job's file stays whatever is asked.
    """
    row = session.scalars(
        select(FileRow)
        .where(FileRow.id == file_id, FileRow.project_id == project_id, FileRow.deleted_at.is_(None))
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound(f"No such File object: {file_id[:100]}", param="file_id")
    user = session.scalars(
        select(JobRow.id)
        .where(
            (JobRow.training_file == file_id) | (JobRow.validation_file == file_id),
            JobRow.status.in_(sorted(UNFINISHED)),
        )
        .limit(1)
    ).one_or_none()
    if user is not None:
        raise Conflict(f"File {file_id} is in use by job {user}. Cancel the job or wait for its end.", param="file_id")
    needing = [] if force else lineage.needing_aliases(session, file_id, project_id=project_id)
    if needing:
        raise Conflict(
            f"File {file_id} is what the alias {needing[0]} stands on: its model, or the one before, was made of it. "
            "Move the alias twice or remove it; or delete the file all the same with ?force=true, and the model cannot "
            "be made again.",
            param="file_id",
            code="file_in_use_by_alias",
        )
    row.deleted_at = session.scalars(select(func.now())).one()
    session.flush()
    return row


def expire(session: Session, *, limit: int = 100) -> Sequence[str]:
    """Mark files deleted whose time has come and that no unfinished job needs. Returns their keys."""
    in_use = select(JobRow.id).where(
        (JobRow.training_file == FileRow.id) | (JobRow.validation_file == FileRow.id),
        JobRow.status.in_(sorted(UNFINISHED)),
    )
    due = (
        select(FileRow.id)
        .where(FileRow.expires_at < func.now(), FileRow.deleted_at.is_(None), ~in_use.exists())
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(
        update(FileRow).where(FileRow.id.in_(due)).values(deleted_at=func.now()).returning(FileRow.key)
    ).all()
