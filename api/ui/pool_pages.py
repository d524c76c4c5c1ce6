"""/ui/pool: devices, who runs where, shares against weights, and the queue; with the scope admin its operation."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from api.deps import Door, DoorDep
from api.routes import pool as pool_routes
from api.routes import projects as project_routes
from api.ui import rendering, visits
from api.ui.visits import JobsVisitor, Operator, ProvenForm
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui/pool", route_class=visits.PageRoute, include_in_schema=False)


@router.get("")
def pool_page(request: Request, door: DoorDep, visit: JobsVisitor) -> Response:
    return rendering.page(request, visit, "pool.html", **_values(door, visit))


def pool_fragment(door: Door, visit: SignedIn) -> str:
    return rendering.fragment("pool_parts.html", visit, **_values(door, visit))


def _values(door: Door, visit: SignedIn) -> dict[str, Any]:
    pool = pool_routes.retrieve_pool(door, visit.caller)
    weights = sum(project.weight for project in pool.projects) or 1.0
    used = sum(project.usage.decayed_device_seconds for project in pool.projects) or 1.0
    shares = [
        (project, 100 * project.weight / weights, 100 * project.usage.decayed_device_seconds / used)
        for project in pool.projects
    ]
    return {"pool": pool, "shares": shares, "names": {project.id: project.name for project in pool.projects}}


@router.post("/hold")
def hold_pool(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    pool_routes.hold_pool(visit.caller, door)
    return visits.back("/ui/pool")


@router.post("/release")
def release_pool(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    pool_routes.release_pool(visit.caller, door)
    return visits.back("/ui/pool")


@router.post("/workers/{worker_id}/{order}")
def order_worker(worker_id: str, order: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    orders = {"drain": pool_routes.drain_worker, "undrain": pool_routes.undrain_worker}
    if order not in orders:
        raise visits.no_such_page(f"/ui/pool/workers/{worker_id}/{order}")
    orders[order](worker_id, visit.caller, door)
    return visits.back("/ui/pool")


@router.post("/devices/quarantine")
def quarantine_device(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    body = json.dumps({"reason": form.get("reason")}).encode()
    pool_routes.quarantine_device(form.must("device"), visit.caller, body, door)
    return visits.back("/ui/pool")


@router.post("/devices/release")
def release_device(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    pool_routes.release_device(form.must("device"), visit.caller, door)
    return visits.back("/ui/pool")


@router.post("/projects/{project_id}/{order}")
def order_project(project_id: str, order: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    orders = {"hold": project_routes.hold_project, "release": project_routes.release_project}
    if order not in orders:
        raise visits.no_such_page(f"/ui/pool/projects/{project_id}/{order}")
    orders[order](project_id, visit.caller, door)
    return visits.back("/ui/pool")
