"""/ui/models: base models with their states, the project's adapters with their files."""

from __future__ import annotations

import json
from typing import Final

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.paging import After
from api.routes import adapters as adapter_routes
from api.routes import catalogue as catalogue_routes
from api.ui import rendering, visits
from api.ui.visits import ModelsVisitor, Operator, ProvenForm

router = APIRouter(prefix="/ui/models", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50


@router.get("")
def models_page(
    request: Request,
    door: DoorDep,
    visit: ModelsVisitor,
    after: After = None,
) -> Response:
    bases = catalogue_routes.list_base_models(door, visit.caller)
    listed = adapter_routes.list_adapters(request, door, visit.caller, after=after, limit=ROWS)
    return rendering.page(
        request, visit, "models.html", bases=bases.data, adapters=listed.data, more=listed.has_more, after=after
    )


@router.post("")
def add_model(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    body = {"source": form.must("source"), "revision": form.get("revision"), "name": form.get("name")}
    catalogue_routes.add_model(visit.caller, json.dumps(body).encode(), door)
    return visits.back("/ui/models")


@router.post("/base/{name}/check")
def check_base_model(name: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    catalogue_routes.check_base_model(name, visit.caller, door)
    return visits.back("/ui/models")


@router.post("/base/{name}/prefetch")
def prefetch_base_model(name: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    catalogue_routes.prefetch_base_model(name, visit.caller, door)
    return visits.back(f"/ui/models/base/{name}")


@router.get("/base/{name}")
def base_model_page(name: str, request: Request, door: DoorDep, visit: ModelsVisitor) -> Response:
    base = catalogue_routes.retrieve_base_model(name, door=door, caller=visit.caller)
    fetches = catalogue_routes.list_prefetches(name, visit.caller, door)
    return rendering.page(request, visit, "base_model.html", base=base, fetches=fetches.data)


@router.get("/{name:path}")
def adapter_page(name: str, request: Request, door: DoorDep, visit: ModelsVisitor) -> Response:
    """An adapter or a checkpoint, by id or name, with a link for each of its files."""
    adapter = adapter_routes.retrieve_adapter(name, request, door, visit.caller)
    return rendering.page(request, visit, "adapter.html", adapter=adapter)
