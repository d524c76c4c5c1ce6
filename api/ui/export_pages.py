"""/ui/jobs/ID/exports: a job's model as GGUF files, or on a hub, started and withdrawn on the job's page."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.routes import exports as export_routes
from api.ui import visits
from api.ui.visits import ModelsOrderer, ProvenForm

router = APIRouter(prefix="/ui/jobs", route_class=visits.PageRoute, include_in_schema=False)


@router.post("/{job_id}/exports")
def start_export(job_id: str, request: Request, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    body: dict[str, Any] = {
        "adapter": form.must("adapter"),
        "format": form.must("format"),
        "quantization": form.get("quantization"),
        "onto": form.get("onto"),
    }
    export_routes.create_export(visit.caller, json.dumps(body).encode(), door, request)
    return visits.back(f"/ui/jobs/{job_id}#exports")


@router.post("/{job_id}/pushes")
def start_push(job_id: str, request: Request, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    body = {
        "model": form.must("model"),
        "repository": form.must("repository"),
        "private": form.get("public") != "yes",
    }
    export_routes.create_push(visit.caller, json.dumps(body).encode(), door, request)
    return visits.back(f"/ui/jobs/{job_id}#exports")


@router.post("/{job_id}/exports/{export_id}/delete")
def delete_export(job_id: str, export_id: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    export_routes.delete_export(export_id, door, visit.caller)
    return visits.back(f"/ui/jobs/{job_id}#exports")
