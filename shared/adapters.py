"""Adapters and checkpoints: found by id or by their `ft:` name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.errors import NotFound
from shared.tables import AdapterRow, CheckpointRow, JobRow

# A checkpoint's folder holds what resuming needs, and its own adapter below this.
_ADAPTER_FOLDER: Final = "adapter/"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a PEFT directory: its name there, and the object that holds its bytes."""

    name: str
    bytes: int
    sha256: str
    key: str


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter as its users see it: of a finished job, or of one of its checkpoints."""

    id: str
    name: str
    job_id: str
    base_model: str
    created_at: datetime
    files: tuple[StoredFile, ...]


def find(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """The adapter with this id or `ft:` name. Raises NotFound."""
    row = session.scalars(
        select(AdapterRow).where(
            (AdapterRow.name == name) | (AdapterRow.id == name),
            AdapterRow.project_id == project_id,
            AdapterRow.deleted_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"The model '{name[:200]}' does not exist in this project.", param="model", code="model_not_found"
        )
    return row


def find_published(session: Session, name: str, *, project_id: str) -> PublishedAdapter:
    """The adapter or checkpoint (`ft:…:ckpt-step-N`) with this id or name. Raises NotFound."""
    found = session.execute(
        select(CheckpointRow, JobRow.base_model)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where((CheckpointRow.name == name) | (CheckpointRow.id == name), JobRow.project_id == project_id)
    ).one_or_none()
    if found is None:
        return published(find(session, name, project_id=project_id))
    row, base_model = found
    return PublishedAdapter(
        id=row.id,
        name=row.name,
        job_id=row.job_id,
        base_model=base_model,
        created_at=row.created_at,
        files=_files(row.manifest, below=_ADAPTER_FOLDER),
    )


def published(row: AdapterRow) -> PublishedAdapter:
    return PublishedAdapter(
        id=row.id,
        name=row.name,
        job_id=row.job_id,
        base_model=row.base_model,
        created_at=row.created_at,
        files=_files(row.manifest),
    )


def _files(manifest: dict[str, Any], *, below: str = "") -> tuple[StoredFile, ...]:
    return tuple(
        StoredFile(
            name=entry["name"].removeprefix(below),
            bytes=entry["bytes"],
            sha256=entry["sha256"],
            key=f"{manifest['prefix']}/{entry['name']}",
        )
        for entry in manifest.get("files", ())
        if entry["name"].startswith(below)
    )


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[AdapterRow], bool]:
    """Adapters of a project, newest first, and whether more follow."""
    query = select(AdapterRow).where(AdapterRow.project_id == project_id, AdapterRow.deleted_at.is_(None))
    if after is not None:
        query = query.where(AdapterRow.id < after)
    rows = session.scalars(query.order_by(AdapterRow.id.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def of_job(session: Session, job_id: str) -> AdapterRow | None:
    return session.scalars(
        select(AdapterRow).where(AdapterRow.job_id == job_id, AdapterRow.deleted_at.is_(None))
    ).one_or_none()


def delete(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """Withdraw an adapter; its name is never used again. Raises NotFound."""
    row = find(session, name, project_id=project_id)
    row.deleted_at = session.scalars(select(func.now())).one()
    session.flush()
    return row
