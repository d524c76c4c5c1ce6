"""Files that come in parts: rows of uploads and of their parts. The bytes go through shared/store/storage.py.

An upload is open until it is completed or cancelled, or until its time is over. Everything that is written for it lies
under one prefix of the store, so that whatever a killed process leaves there is found (shared/products/garbage.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import BigInteger, ColumnElement, Select, cast, func, select, update
from sqlalchemy.orm import Session

from shared.errors import Invalid, NotFound, TooLarge
from shared.ids import new_id
from shared.products import files, quota
from shared.products.files import Upload
from shared.products.quota import Quota
from shared.store import layout
from shared.store.tables import FileRow, UploadPartRow, UploadRow

MAX_PART_BYTES: Final = 64 * 1024 * 1024
MAX_PARTS: Final = 10_000
# Whoever began to complete an upload in time may end after it: the file is being put together meanwhile.
COMPLETION: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a client says of a file before it sends any of it."""

    bytes: int
    filename: str
    mime_type: str
    purpose: str
    file_lives_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """How the parts of an upload become its file: the parts' keys in order, and where the whole goes."""

    announced: Announcement
    part_keys: tuple[str, ...]
    file_id: str
    key: str


def create(
    session: Session, announced: Announcement, *, project_id: str, usual: Quota, open_seconds: float
) -> UploadRow:
    """Open an upload, and reserve its bytes and its place among the files. Raises LimitReached."""
    quota.take_turn(session, project_id)
    quota.refuse_when_full(session, project_id, usual, adding=announced.bytes)
    row = UploadRow(
        id=new_id("upload_"),
        project_id=project_id,
        bytes=announced.bytes,
        filename=announced.filename,
        mime_type=announced.mime_type,
        purpose=announced.purpose,
        file_lives_seconds=announced.file_lives_seconds,
        expires_at=func.now() + timedelta(seconds=open_seconds),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def must_be_open(session: Session, upload_id: str, *, project_id: str, lock: bool = False) -> UploadRow:
    """The upload, to which parts may be added. Raises NotFound, Invalid when it has ended."""
    row = _find(session, upload_id, project_id=project_id, lock=lock)
    _refuse_ended(session, row)
    return row


def _refuse_ended(session: Session, row: UploadRow) -> None:
    status = status_of(session, row)
    if status != "pending":
        raise Invalid(f"Upload {row.id} is {status}; begin a new one.", param="upload_id", code="upload_not_pending")


def status_of(session: Session, row: UploadRow) -> str:
    """`status` as it is this moment: one whose time is over is expired before the janitor has said so."""
    late = row.status == "pending" and session.scalars(select(UploadRow.expires_at < func.now()).where(_is(row))).one()
    return "expired" if late else row.status


def add_part(session: Session, upload_id: str, part: UploadPartRow, *, project_id: str) -> UploadPartRow:
    """Accept a part whose bytes are in the store. When the upload has these bytes already, that part is returned.

    Raises NotFound, Invalid when the upload has ended or has more parts than it may, TooLarge when the parts hold more
    than was announced.
    """
    upload = must_be_open(session, upload_id, project_id=project_id, lock=True)
    same = select(UploadPartRow).where(UploadPartRow.upload_id == upload.id, UploadPartRow.sha256 == part.sha256)
    present = session.scalars(same).one_or_none()
    if present is not None:
        return present
    total = cast(func.coalesce(func.sum(UploadPartRow.bytes), 0), BigInteger)
    parts, size = session.execute(select(func.count(), total).where(UploadPartRow.upload_id == upload.id)).one()
    if size + part.bytes > upload.bytes:
        raise TooLarge(
            f"The upload was announced with {upload.bytes:,} bytes, and its parts would hold {size + part.bytes:,}.",
            param="data",
            code="upload_too_long",
        )
    if parts >= MAX_PARTS:
        raise Invalid(f"An upload has {MAX_PARTS:,} parts at the most; send larger ones.", param="data")
    session.add(part)
    session.flush()
    session.refresh(part)
    return part


def assembly(session: Session, upload_id: str, part_ids: Sequence[str], *, project_id: str) -> Assembly | UploadRow:
    """What is left to do to complete the upload with these parts; the upload when that is done already.

    Raises NotFound; Invalid when it has ended otherwise, names a part that it has not, or is not as long as announced.
    """
    upload = _find(session, upload_id, project_id=project_id)
    if upload.status == "completed" and upload.part_ids == list(part_ids):
        return upload  # asked again: the answer was lost on its way
    _refuse_ended(session, upload)  # of the row as it was just read: another request may complete it any moment
    parts = {row.id: row for row in session.scalars(_parts(upload))}
    for place, part_id in enumerate(part_ids):
        if part_id not in parts:
            raise Invalid(f"Upload {upload.id} has no part '{part_id[:100]}'.", param=f"part_ids.{place}")
    size = sum(parts[part_id].bytes for part_id in part_ids)
    if size != upload.bytes:
        raise Invalid(
            f"The upload was announced with {upload.bytes:,} bytes, and these parts hold {size:,}.",
            param="part_ids",
            code="upload_incomplete",
        )
    file_id = new_id("file-")
    return Assembly(
        announced=Announcement(
            upload.bytes, upload.filename, upload.mime_type, upload.purpose, upload.file_lives_seconds
        ),
        part_keys=tuple(parts[part_id].key for part_id in part_ids),
        file_id=file_id,
        key=layout.assembled_key(project_id, upload.id, file_id),
    )


def complete(
    session: Session, upload_id: str, part_ids: Sequence[str], file: Upload, *, project_id: str
) -> UploadRow | None:
    """pending -> completed, with the file. None: somebody else has completed, cancelled or expired it meanwhile."""
    upload = _find(session, upload_id, project_id=project_id, lock=True)
    if upload.status != "pending":
        return None
    row = files.add(session, file, project_id=project_id)
    ended_at = session.scalars(select(func.now())).one()
    upload.status, upload.ended_at, upload.file_id, upload.part_ids = "completed", ended_at, row.id, list(part_ids)
    session.flush()
    return upload


def cancel(session: Session, upload_id: str, *, project_id: str) -> UploadRow:
    """pending -> cancelled; twice is fine. Raises NotFound, Invalid when it has ended otherwise."""
    row = _find(session, upload_id, project_id=project_id, lock=True)
    if row.status == "cancelled":
        return row
    _refuse_ended(session, row)
    ended_at = session.scalars(select(func.now())).one()
    row.status, row.ended_at = "cancelled", ended_at
    session.flush()
    return row


def file_of(session: Session, upload: UploadRow) -> FileRow | None:
    """The file of a completed upload, unless it is deleted by now."""
    row = None if upload.file_id is None else session.get(FileRow, upload.file_id)
    return None if row is None or row.deleted_at is not None else row


def part_keys(session: Session, upload: UploadRow) -> Sequence[str]:
    """Where the parts of an upload lie."""
    return [row.key for row in session.scalars(_parts(upload))]


def expire(session: Session, *, limit: int = 1000) -> Sequence[str]:
    """Close uploads whose time is over for so long that nobody completes them any more. Returns their ids."""
    due = (
        select(UploadRow.id)
        .where(UploadRow.status == "pending", UploadRow.expires_at < func.now() - COMPLETION)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    closed = update(UploadRow).where(UploadRow.id.in_(due)).values(status="expired", ended_at=func.now())
    return session.scalars(closed.returning(UploadRow.id)).all()


def new_part(upload_id: str, *, project_id: str) -> UploadPartRow:
    """A part that is about to come: its id, and where its bytes go."""
    part_id = new_id("part_")
    return UploadPartRow(id=part_id, upload_id=upload_id, key=layout.part_key(project_id, upload_id, part_id))


def _find(session: Session, upload_id: str, *, project_id: str, lock: bool = False) -> UploadRow:
    query = select(UploadRow).where(UploadRow.id == upload_id, UploadRow.project_id == project_id)
    query = query.execution_options(populate_existing=True)
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"No such Upload object: {upload_id[:100]}", param="upload_id")
    return row


def _is(row: UploadRow) -> ColumnElement[bool]:
    return UploadRow.id == row.id


def _parts(upload: UploadRow) -> Select[UploadPartRow]:
    return select(UploadPartRow).where(UploadPartRow.upload_id == upload.id)
