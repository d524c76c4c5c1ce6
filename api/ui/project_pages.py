"""/ui/projects: the tenants of the pool, with what each may use and uses."""

from __future__ import annotations

import json
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.routes import projects as project_routes
from api.ui import rendering, visits
from api.ui.visits import Operator, ProvenForm, SubmittedForm

router = APIRouter(prefix="/ui/projects", route_class=visits.PageRoute, include_in_schema=False)

# Field of a body -> (words, what an empty one means)
FIELDS: Final = {
    "weight": ("Weight", "1"),
    "guarantee": ("Devices of its own", "0"),
    "max_running": ("Devices at a time", "no cap"),
    "max_queued": ("Waiting jobs", "no cap"),
    "max_files": ("Files", "as the service is set"),
    "max_bytes": ("Bytes of files", "as the service is set"),
    "budget_gpu_hours": ("GPU hours a month", "no budget"),
    "budget_soft_gpu_hours": ("GPU hours a month, then warn", "no warning"),
}
_WITHOUT_NULL: Final = frozenset({"weight", "guarantee"})


@router.get("")
def projects_page(request: Request, door: DoorDep, visit: Operator) -> Response:
    listed = project_routes.list_projects(visit.caller, door).data
    return rendering.page(request, visit, "projects.html", projects=listed, fields=FIELDS)


@router.post("")
def create_project(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    body = {name: value for name, value in _body(form).items() if value is not None}
    made = project_routes.create_project(visit.caller, json.dumps(body).encode(), door)
    return visits.back(visits.address("/ui/projects", made.id))


@router.get("/{project_id}")
def project_page(project_id: str, request: Request, door: DoorDep, visit: Operator) -> Response:
    project = project_routes.retrieve_project(project_id, visit.caller, door)
    keys = project_routes.list_keys(visit.caller, door, project_id=project.id).data
    live = [key for key in keys if key.revoked_at is None]
    return rendering.page(request, visit, "project.html", project=project, keys=live, fields=FIELDS)


@router.post("/{project_id}")
def edit_project(project_id: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    """Every field as the form has it: an empty one takes a cap away."""
    project_routes.edit_project(project_id, visit.caller, json.dumps(_body(form)).encode(), door)
    return visits.back(visits.address("/ui/projects", project_id))


@router.post("/{project_id}/{order}")
def order_project(project_id: str, order: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    orders = {"hold": project_routes.hold_project, "release": project_routes.release_project}
    if order not in orders:
        raise visits.no_such_page(f"/ui/projects/{project_id}/{order}")
    orders[order](project_id, visit.caller, door)
    return visits.back(visits.address("/ui/projects", project_id))


def _body(form: SubmittedForm) -> dict[str, Any]:
    """A body of the API's route. Raises Invalid for a missing name and for what is no number."""
    values: dict[str, Any] = {"name": form.must("name")}
    for name in FIELDS:
        value = form.number(name)
        if value is not None or name not in _WITHOUT_NULL:
            values[name] = value
    return values
