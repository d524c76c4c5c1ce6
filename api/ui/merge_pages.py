"""/ui/jobs/ID/merges: whole models made of a job's adapter, started and withdrawn on the job's page."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.routes import merges as merge_routes
from api.ui import visits
from api.ui.visits import ModelsOrderer, ProvenForm

router = APIRouter(prefix="/ui/jobs", route_class=visits.PageRoute, include_in_schema=False)


@router.post("/{job_id}/merges")
def start_merge(job_id: str, request: Request, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    body = {"adapter": form.must("adapter"), "onto": form.must("onto")}
    merge_routes.create_merge(visit.caller, json.dumps(body).encode(), door, request)
    return visits.back(f"/ui/jobs/{job_id}#merges")


@router.post("/{job_id}/merges/{merge_id}/delete")
def delete_merge(job_id: str, merge_id: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    merge_routes.delete_merge(merge_id, door, visit.caller)
    return visits.back(f"/ui/jobs/{job_id}#merges")
