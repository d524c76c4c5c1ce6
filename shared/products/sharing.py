"""Permissions: an administrator lets another project of the organization use a tuned model or a checkpoint.

To use is to ask it, to see it, to download it and to make products of it. Only its own project deletes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Invalid, NotFound
from shared.ids import new_id
from shared.products import adapters
from shared.store import paging
from shared.store.tables import AdapterRow, CheckpointRow, JobRow, PermissionRow, ProjectRow


def grant(
    session: Session, checkpoint: str, project_ids: Sequence[str], *, organization_id: str
) -> Sequence[PermissionRow]:
    """Let these projects use the model of that `ft:` name; those that may already keep their permission.

    Raises NotFound when the organization has no such model, Invalid when a project is not another one of it.
    """
    owner = _owner(session, checkpoint, organization_id=organization_id)
    known = select(ProjectRow.id).where(ProjectRow.organization_id == organization_id, ProjectRow.id.in_(project_ids))
    ours = set(session.scalars(known))
    for place, project_id in enumerate(project_ids):
        if project_id not in ours:
            raise Invalid(f"The organization has no project '{project_id[:100]}'.", param=f"project_ids.{place}")
        if project_id == owner:
            raise Invalid(
                f"The model is of project '{project_id}' itself: name other projects.", param=f"project_ids.{place}"
            )
    for project_id in dict.fromkeys(project_ids):
        values = {"id": new_id("cp_"), "checkpoint": checkpoint, "owner_id": owner, "project_id": project_id}
        session.execute(insert(PermissionRow).values(**values).on_conflict_do_nothing())
    given = select(PermissionRow).where(
        PermissionRow.checkpoint == checkpoint, PermissionRow.project_id.in_(project_ids)
    )
    return session.scalars(given.order_by(PermissionRow.id)).all()


def page(
    session: Session,
    checkpoint: str,
    *,
    organization_id: str,
    project_id: str | None,
    after: str | None,
    limit: int,
    order: Literal["ascending", "descending"],
) -> tuple[Sequence[PermissionRow], bool]:
    """The permissions of a model, and whether more follow. Raises NotFound when the organization has no such model."""
    _owner(session, checkpoint, organization_id=organization_id)
    query = select(PermissionRow).where(PermissionRow.checkpoint == checkpoint)
    if project_id is not None:
        query = query.where(PermissionRow.project_id == project_id)
    turned: paging.Order = "asc" if order == "ascending" else "desc"
    return paging.page(session, query, PermissionRow.id, after=after, limit=limit, order=turned)


def revoke(session: Session, checkpoint: str, permission_id: str, *, organization_id: str) -> PermissionRow:
    """End a permission; the next request of that project is refused. Raises NotFound."""
    _owner(session, checkpoint, organization_id=organization_id)
    gone = delete(PermissionRow).where(PermissionRow.id == permission_id, PermissionRow.checkpoint == checkpoint)
    row = session.scalars(gone.returning(PermissionRow)).one_or_none()
    if row is None:
        raise NotFound(f"'{checkpoint[:200]}' has no permission '{permission_id[:100]}'.", param="permission_id")
    return row


def shared_with(session: Session, project_id: str) -> Sequence[AdapterRow]:
    """Tuned models of other projects that this one may use."""
    query = (
        select(AdapterRow)
        .join(PermissionRow, PermissionRow.checkpoint == AdapterRow.name)
        .where(PermissionRow.project_id == project_id, AdapterRow.deleted_at.is_(None))
    )
    return session.scalars(query.order_by(AdapterRow.id.desc())).all()


def _owner(session: Session, checkpoint: str, *, organization_id: str) -> str:
    """The project that a tuned model or checkpoint is of."""
    of_adapter = select(AdapterRow.project_id).where(AdapterRow.name == checkpoint, AdapterRow.deleted_at.is_(None))
    of_checkpoint = (
        select(JobRow.project_id)
        .join(CheckpointRow, CheckpointRow.job_id == JobRow.id)
        .where(CheckpointRow.name == checkpoint)
    )
    owner = session.scalars(
        select(ProjectRow.id).where(
            ProjectRow.organization_id == organization_id,
            ProjectRow.id.in_(of_adapter) | ProjectRow.id.in_(of_checkpoint),
        )
    ).one_or_none()
    if owner is None:
        raise adapters.unknown(checkpoint, param="fine_tuned_model_checkpoint")
    return owner
