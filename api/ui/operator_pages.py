"""/ui/usage, keys and audit: what was used, who may act, and who did."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from api.deps import Door, DoorDep
from api.paging import After
from api.routes import pool as pool_routes
from api.routes import projects as project_routes
from api.routes import usage as usage_routes
from api.ui import rendering, visits
from api.ui.visits import JobsVisitor, Operator, ProvenForm
from api.views.pool_views import NewKey
from shared.tenants import keys, usage
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
GroupBy = Annotated[list[str] | None, Query(max_length=20)]
Label = Annotated[str, Query(max_length=64)]  # as of a name in the metadata


@router.get("/usage")
def usage_page(
    request: Request, door: DoorDep, visit: JobsVisitor, group_by: GroupBy = None, label: Label = ""
) -> Response:
    """Device time of this month by up to four groups; `label` is what a form can say of `label:NAME`."""
    groups = [name for name in group_by or ([] if label else ["project", "key"]) if name]
    groups += [f"{usage.LABEL}{label}"] if label else []
    used = usage_routes.report_usage(door, visit.caller, group_by=groups)
    label = next((name for name in groups if name.startswith(usage.LABEL)), "")
    return rendering.page(
        request,
        visit,
        "usage.html",
        used=used,
        names=_names(door, visit),
        groups=groups,
        dimensions=usage.DIMENSIONS,
        label=label.removeprefix(usage.LABEL),
    )


def _names(door: Door, visit: SignedIn) -> dict[str, str]:
    """Of projects and keys by their ids, for who may see them all."""
    if not visit.caller.may("admin"):
        return {}
    projects = project_routes.list_projects(visit.caller, door).data
    listed = project_routes.list_keys(visit.caller, door).data
    return {project.id: project.name for project in projects} | {key.id: key.name for key in listed}


@router.get("/usage.csv")
def usage_csv(door: DoorDep, visit: JobsVisitor, group_by: GroupBy = None) -> Response:
    answer: Response = usage_routes.report_usage(door, visit.caller, group_by=group_by, as_format="csv")
    answer.headers["Content-Disposition"] = 'attachment; filename="usage.csv"'
    return answer


@router.get("/keys")
def keys_page(request: Request, door: DoorDep, visit: Operator) -> Response:
    return _keys(request, door, visit)


def _keys(request: Request, door: Door, visit: SignedIn, made: NewKey | None = None) -> Response:
    projects = project_routes.list_projects(visit.caller, door).data
    listed = project_routes.list_keys(visit.caller, door).data
    return rendering.page(
        request,
        visit,
        "keys.html",
        keys=sorted(listed, key=lambda key: (key.revoked_at is not None, -key.created_at)),
        projects=projects,
        names={project.id: project.name for project in projects},
        scopes=sorted(keys.SCOPES),
        made=made,
    )


@router.post("/keys")
def create_key(request: Request, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    """The answer itself shows the secret: nothing can show it again, and no address holds it."""
    body: dict[str, Any] = {"project_id": form.must("project_id"), "name": form.must("name")}
    if form.all("scopes"):
        body["scopes"] = form.all("scopes")
    made = project_routes.create_key(visit.caller, json.dumps(body).encode(), door)
    return _keys(request, door, visit, made)


@router.post("/keys/{key_id}/rotate")
def rotate_key(key_id: str, request: Request, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    """A new secret, shown as a new key's; the one until now stays valid for a day."""
    return _keys(request, door, visit, project_routes.rotate_key(key_id, visit.caller, b"{}", door))


@router.post("/keys/{key_id}/revoke")
def revoke_key(key_id: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    project_routes.revoke_key(key_id, visit.caller, door)
    return visits.back("/ui/keys")


@router.get("/audit")
def audit_page(
    request: Request,
    door: DoorDep,
    visit: Operator,
    after: After = None,
    target: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    listed = pool_routes.list_audit(visit.caller, door, after=after, limit=ROWS, target=target or None)
    return rendering.page(
        request, visit, "audit.html", entries=listed.data, more=listed.has_more, target=target, after=after
    )
