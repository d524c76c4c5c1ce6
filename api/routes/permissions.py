"""/v1/fine_tuning/checkpoints/{checkpoint}/permissions: which other projects may use a tuned model or a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api.body import RawBody, body_of, parse
from api.deps import Administrator, DoorDep
from api.paging import After, Limit
from api.upload_bodies import CreatePermissions
from api.views import permission_views, view
from shared.products import sharing
from shared.tenants import audit

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine-tuning"])


@router.post(
    "/{checkpoint:path}/permissions",
    response_model=permission_views.PermissionPage,
    openapi_extra=body_of(CreatePermissions),
)
def create_permissions(
    checkpoint: str, caller: Administrator, body: RawBody, door: DoorDep
) -> permission_views.PermissionPage:
    """Let other projects of the organization use a tuned model or a checkpoint."""
    wanted = parse(body, CreatePermissions)
    with door.session() as session:
        rows = sharing.grant(session, checkpoint, wanted.project_ids, organization_id=caller.organization_id)
        audit.record(session, caller, "permission.create", checkpoint, after={"project_ids": wanted.project_ids})
        return permission_views.page(rows, more=False)


@router.get("/{checkpoint:path}/permissions", response_model=permission_views.PermissionPage)
def list_permissions(
    checkpoint: str,
    caller: Administrator,
    door: DoorDep,
    project_id: Annotated[str | None, Query(max_length=100)] = None,
    after: After = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> permission_views.PermissionPage:
    """Who may use a tuned model or a checkpoint."""
    with door.session() as session:
        rows, more = sharing.page(
            session,
            checkpoint,
            organization_id=caller.organization_id,
            project_id=project_id,
            after=after,
            limit=limit,
            order=order,
        )
    return permission_views.page(rows, more=more)


@router.delete("/{checkpoint:path}/permissions/{permission_id}", response_model=view.Deleted)
def delete_permission(checkpoint: str, permission_id: str, caller: Administrator, door: DoorDep) -> view.Deleted:
    """End a permission: the next request of that project is refused."""
    with door.session() as session:
        row = sharing.revoke(session, checkpoint, permission_id, organization_id=caller.organization_id)
        audit.record(session, caller, "permission.delete", checkpoint, before={"project_id": row.project_id})
    return view.Deleted(id=permission_id, object="checkpoint.permission")
