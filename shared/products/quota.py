"""How many files and bytes a project may keep: uploads, and what its jobs made as files. Products are not counted.

An upload that is open counts as the file that it will be, with all its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, cast, func, select
from sqlalchemy.orm import Session

from shared.errors import LimitReached
from shared.settings import Settings
from shared.store.locks import one_at_a_time
from shared.store.tables import FileRow, ProjectRow, UploadRow


@dataclass(frozen=True, slots=True)
class Quota:
    """What a project without limits of its own may keep; 0: any number."""

    files: int
    bytes: int


def quota_of(settings: Settings) -> Quota:
    return Quota(files=settings.project_files, bytes=settings.project_bytes)


def refuse_when_full(session: Session, project_id: str, usual: Quota, *, adding: int = 1) -> None:
    """Raises LimitReached if the project has no room for one more file, of `adding` bytes."""
    limits = select(ProjectRow.max_files, ProjectRow.max_bytes).where(ProjectRow.id == project_id)
    own_files, own_bytes = session.execute(limits).one()
    most_files = usual.files if own_files is None else own_files
    most_bytes = usual.bytes if own_bytes is None else own_bytes
    kept = select(func.count(), cast(func.coalesce(func.sum(FileRow.bytes), 0), BigInteger)).where(
        FileRow.project_id == project_id, FileRow.deleted_at.is_(None)
    )
    coming = select(func.count(), cast(func.coalesce(func.sum(UploadRow.bytes), 0), BigInteger)).where(
        UploadRow.project_id == project_id, UploadRow.status == "pending", UploadRow.expires_at > func.now()
    )
    files, size = session.execute(kept).one()
    open_files, open_size = session.execute(coming).one()
    files, size = files + open_files, size + open_size
    if (own_files is not None or most_files) and files + 1 > most_files:
        raise _full(f"The project keeps {files:,} files, and its limit is {most_files:,}.")
    if (own_bytes is not None or most_bytes) and size + adding > most_bytes:
        raise _full(
            f"The project keeps {size:,} bytes of files, {adding:,} more are asked, its limit is {most_bytes:,}."
        )


def take_turn(session: Session, project_id: str) -> None:
    """Have two uploads of a project not both take the last room; until the transaction ends."""
    one_at_a_time(session, f"quota:{project_id}")


def _full(message: str) -> LimitReached:
    return LimitReached(
        f"{message} Delete files, or ask your administrator for a higher limit.", param="file", code="quota_exceeded"
    )
