"""Finds adapters and checkpoints by id or by their `ft:` name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, SQLColumnExpression, func, select
from sqlalchemy.orm import Session

from shared.contract.documents import Manifest
from shared.contract.spec import JobSpec
from shared.errors import Invalid, NotFound
from shared.products import aliases, lineage
from shared.store import paging
from shared.store.tables import AdapterRow, CheckpointRow, JobRow, MergeRow, PermissionRow

# A checkpoint's folder holds what resuming needs, and its own adapter below this.
_ADAPTER_FOLDER: Final = "adapter/"
# Names and ids of adapters, checkpoints and combinations; every other name is a base model's.
_BEGINNINGS: Final = ("ft:", "adapter_", "ftckpt_", "merge_")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a PEFT directory: its name there, and the object that holds its bytes."""

    name: str
    bytes: int
    sha256: str
    key: str


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter as its users see it: of a finished job, of one of its checkpoints, or combined of others."""

    id: str
    name: str
    job_id: str | None  # None: combined
    base_model: str
    created_at: datetime
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter that something is made of, and the spec it was trained by."""

    adapter: PublishedAdapter
    spec: JobSpec


def is_tuned(name: str) -> bool:
    """Whether `model` of a request names a tuned model, a checkpoint or an alias of one, rather than a base model."""
    return name.startswith(_BEGINNINGS) or aliases.SIGN in name


def find(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """The project's own adapter with this id or `ft:` name. Raises NotFound."""
    return _find(session, name, AdapterRow.project_id == project_id)


def _find(session: Session, name: str, reachable: ColumnElement[bool]) -> AdapterRow:
    row = session.scalars(
        select(AdapterRow).where(
            (AdapterRow.name == name) | (AdapterRow.id == name), reachable, AdapterRow.deleted_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        raise unknown(name)
    return row


def unknown(name: str, *, param: str = "model") -> NotFound:
    return NotFound(f"The model '{name[:200]}' does not exist in this project.", param=param, code="model_not_found")


def _may_use(name: SQLColumnExpression[str], owner: SQLColumnExpression[str], project_id: str) -> ColumnElement[bool]:
    """It is the project's own, or shared with it (shared/products/sharing.py)."""
    shared = select(PermissionRow.id).where(PermissionRow.checkpoint == name, PermissionRow.project_id == project_id)
    return (owner == project_id) | shared.exists()


def find_published(session: Session, name: str, *, project_id: str) -> PublishedAdapter:
    """The adapter, checkpoint (`ft:…:ckpt-step-N`) or combination with this id, name or alias that the project may use.

    Raises NotFound.
    """
    name = aliases.resolved(session, name, project_id=project_id)
    combined = _combination(session, name, project_id=project_id)
    if combined is not None:
        return _published_combination(combined)
    pair = session.execute(
        select(CheckpointRow, JobRow.base_model)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(
            (CheckpointRow.name == name) | (CheckpointRow.id == name),
            _may_use(CheckpointRow.name, JobRow.project_id, project_id),
        )
    ).one_or_none()
    if pair is None:
        return published(_find(session, name, _may_use(AdapterRow.name, AdapterRow.project_id, project_id)))
    row, base_model = pair
    return PublishedAdapter(
        id=row.id,
        name=row.name,
        job_id=row.job_id,
        base_model=base_model,
        created_at=row.created_at,
        files=stored_files(row.manifest, below=_ADAPTER_FOLDER),
    )


def find_source(session: Session, name: str, *, project_id: str) -> Source:
    """The same, with the spec of the job behind it. Raises NotFound."""
    published = find_published(session, name, project_id=project_id)
    made_by = (
        session.get_one(MergeRow, published.id)
        if published.job_id is None
        else session.get_one(JobRow, published.job_id)
    )
    return Source(adapter=published, spec=JobSpec.model_validate(made_by.spec))


def _combination(session: Session, name: str, *, project_id: str) -> MergeRow | None:
    return session.scalars(
        select(MergeRow).where(
            MergeRow.id == name,
            MergeRow.project_id == project_id,
            MergeRow.kind == "combination",
            MergeRow.status == "succeeded",
            MergeRow.deleted_at.is_(None),
        )
    ).one_or_none()


def _published_combination(row: MergeRow) -> PublishedAdapter:
    assert row.manifest is not None, "a check constraint says so"
    return PublishedAdapter(
        id=row.id,
        name=row.id,
        job_id=None,
        base_model=row.base_model,
        created_at=row.created_at,
        files=stored_files(row.manifest),
    )


def published(row: AdapterRow) -> PublishedAdapter:
    return PublishedAdapter(
        id=row.id,
        name=row.name,
        job_id=row.job_id,
        base_model=row.base_model,
        created_at=row.created_at,
        files=stored_files(row.manifest),
    )


def stored_files(manifest: dict[str, Any], *, below: str = "") -> tuple[StoredFile, ...]:
    """The files that a row's manifest names, or those of one folder of it; none before there is a manifest."""
    if not manifest:
        return ()
    named = Manifest.read(manifest)
    return tuple(
        StoredFile(name=entry.name.removeprefix(below), bytes=entry.bytes, sha256=entry.sha256, key=named.key(entry))
        for entry in named.files
        if entry.name.startswith(below)
    )


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[AdapterRow], bool]:
    """Adapters of a project, newest first, and whether more follow."""
    query = select(AdapterRow).where(AdapterRow.deleted_at.is_(None))
    mine = AdapterRow.project_id == project_id
    return paging.page(session, query, AdapterRow.id, mine, after=after, limit=limit, what="adapter")


def of_job(session: Session, job_id: str) -> AdapterRow | None:
    return session.scalars(
        select(AdapterRow).where(AdapterRow.job_id == job_id, AdapterRow.deleted_at.is_(None))
    ).one_or_none()


def delete(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """Withdraw an adapter; its name is never used again.

    Raises NotFound, Invalid; Conflict if an alias, an unfinished job or an unfinished product needs it.
    """
    if aliases.SIGN in name:
        raise Invalid(
            f"'{name[:200]}' is an alias; DELETE /v1/tunepool/aliases/{name[:200]} removes it.", param="model"
        )
    row = find(session, name, project_id=project_id)
    session.refresh(row, with_for_update=True)  # a promotion that is under way ends first
    aliases.refuse_needed(session, row.id, name=row.name)
    lineage.refuse_needed_by_jobs(session, row.id, name=row.name, project_id=project_id)
    lineage.refuse_needed_by_products(session, row.name, row.id, project_id=project_id)
    row.deleted_at = session.scalars(select(func.now())).one()
    session.flush()
    return row
