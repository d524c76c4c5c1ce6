"""Projects: the tenants of the pool, their weights, quotas and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid, NotFound
from shared.ids import new_id
from shared.store.tables import ProjectRow
from shared.tenants import audit
from shared.tenants.keys import Caller

# What an administrator may set, in the words of the row.
EDITABLE: Final = (
    "name",
    "weight",
    "guarantee",
    "max_running",
    "max_queued",
    "max_bytes",
    "max_files",
    "budget_device_seconds",
    "budget_soft_device_seconds",
)


def listed(session: Session) -> Sequence[ProjectRow]:
    return session.scalars(select(ProjectRow).order_by(ProjectRow.id)).all()


def find(session: Session, project_id: str) -> ProjectRow:
    """A project with its row's lock. Raises NotFound."""
    row = session.scalars(select(ProjectRow).where(ProjectRow.id == project_id).with_for_update()).one_or_none()
    if row is None:
        raise NotFound(f"No project '{project_id[:100]}'.", param="project_id")
    return row


def create(session: Session, caller: Caller, **values: Any) -> ProjectRow:
    """A new project in the caller's organization. Raises Conflict when its name is taken, Invalid."""
    row = ProjectRow(id=new_id("proj_"), organization_id=caller.organization_id, **values)
    _refuse_taken(session, row.organization_id, values["name"])
    session.add(row)
    session.flush()
    _refuse_crossed(row)
    session.refresh(row)
    audit.record(session, caller, "project.create", row.id, after=settings_of(row))
    return row


def edit(session: Session, caller: Caller, project_id: str, changes: dict[str, Any]) -> ProjectRow:
    """Change some of `EDITABLE`; the next plan follows. Raises NotFound, Conflict, Invalid."""
    row = find(session, project_id)
    before = settings_of(row)
    if changes.get("name", row.name) != row.name:
        _refuse_taken(session, row.organization_id, changes["name"])
    for name, value in changes.items():
        assert name in EDITABLE
        setattr(row, name, value)
    _refuse_crossed(row)
    session.flush()
    audit.record(session, caller, "project.edit", row.id, before=before, after=settings_of(row))
    return row


def set_held(session: Session, caller: Caller, project_id: str, *, held: bool) -> ProjectRow:
    """Start none of a project's jobs, or start them again; what runs goes on. Raises NotFound."""
    row = find(session, project_id)
    before, row.held = row.held, held
    session.flush()
    action = "project.hold" if held else "project.release"
    audit.record(session, caller, action, row.id, before={"held": before}, after={"held": held})
    return row


def settings_of(row: ProjectRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in EDITABLE}


def _refuse_taken(session: Session, organization_id: str, name: str) -> None:
    taken = select(ProjectRow.id).where(ProjectRow.organization_id == organization_id, ProjectRow.name == name)
    if session.scalars(taken).first() is not None:
        raise Conflict(f"A project '{name}' exists already.", param="name", code="project_exists")


def _refuse_crossed(row: ProjectRow) -> None:
    soft, hard = row.budget_soft_device_seconds, row.budget_device_seconds
    if soft is not None and hard is not None and soft > hard:
        raise Invalid(
            f"budget_soft_gpu_hours ({soft / 3600:g}) is above budget_gpu_hours ({hard / 3600:g}); lower it.",
            param="budget_soft_gpu_hours",
        )
    if row.max_running is not None and (row.guarantee or 0) > row.max_running:
        raise Invalid(
            f"guarantee ({row.guarantee}) is above max_running ({row.max_running}); it could never be used.",
            param="guarantee",
        )
