"""/v1/tunepool/exports: tuned models as files for other servers."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request

from api.body import RawBody, body_of, parse
from api.deps import Door, DoorDep, ModelsReader, ModelsWriter
from api.downloads import linked
from api.paging import After, Limit
from api.views import export_views, view
from shared.chores import exports, pushes, reach
from shared.contract.merge_request import CreateExport, CreatePush
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

_MODEL: Final = "ft:smollm2-135m-instruct:acme:tickets:0193a1b2"
EXPORT_BODY: Final = body_of(CreateExport, example={"adapter": _MODEL, "format": "gguf", "quantization": "q8_0"})
PUSH_BODY: Final = body_of(CreatePush, example={"model": _MODEL, "repository": "acme/tickets", "private": True})


@router.post("/exports", response_model=export_views.Export, openapi_extra=EXPORT_BODY)
def create_export(caller: ModelsWriter, body: RawBody, door: DoorDep, request: Request) -> export_views.Export:
    """Have a tuned model written as GGUF, whole or as an adapter, with a Modelfile for Ollama."""
    wanted = parse(body, CreateExport)
    with door.session() as session:
        row = exports.submit(session, wanted, project_id=caller.project_id)
        audit.record(session, caller, "export.create", row.id)
    door.ring("cpu")
    return export_views.export(row, files=linked(exports.product(row), door, request))


@router.post("/pushes", response_model=export_views.Export, openapi_extra=PUSH_BODY)
def create_push(caller: ModelsWriter, body: RawBody, door: DoorDep, request: Request) -> export_views.Export:
    """Have a model's files brought into a repository of the hub, with the project's token; an export of its own."""
    wanted = parse(body, CreatePush)
    with door.session() as session:
        row = pushes.submit(session, wanted, project_id=caller.project_id, settings=door.settings)
        audit.record(session, caller, "push.create", row.id, after={"repository": wanted.repository})
    door.ring("cpu")
    return export_views.export(row, files=linked(exports.product(row), door, request))


@router.get("/exports", response_model=export_views.ExportPage)
def list_exports(
    request: Request,
    door: DoorDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> export_views.ExportPage:
    """The project's exports, newest first."""
    with door.session() as session:
        rows, more = exports.page(session, project_id=caller.project_id, after=after, limit=limit)
    data = [export_views.export(row, files=linked(exports.product(row), door, request)) for row in rows]
    return export_views.ExportPage(data=data, has_more=more)


def of_model(door: Door, caller: Caller, request: Request, name: str, *, limit: int) -> list[export_views.Export]:
    """Exports and pushes of a tuned model and of its checkpoints, newest first."""
    with door.session() as session:
        rows = exports.of_model(session, name, project_id=caller.project_id, limit=limit)
    return [export_views.export(row, files=linked(exports.product(row), door, request)) for row in rows]


@router.get("/exports/{export_id}", response_model=export_views.Export)
def retrieve_export(export_id: str, request: Request, door: DoorDep, caller: ModelsReader) -> export_views.Export:
    """An export; once it has succeeded, with a link for each file."""
    with door.session() as session:
        row = exports.find(session, export_id, project_id=caller.project_id)
    return export_views.export(row, files=linked(exports.product(row), door, request))


@router.delete("/exports/{export_id}", response_model=view.Deleted)
def delete_export(export_id: str, door: DoorDep, caller: ModelsWriter) -> view.Deleted:
    """Withdraw an export and its files. One that is not made yet ends, also by a key with the scope admin."""
    with door.session() as session:
        owner = reach.project_of(session, exports.EXPORT, export_id, caller=caller)
        row = exports.delete(session, export_id, project_id=owner)
        before = {"status": row.status, "project_id": row.project_id}
        audit.record(session, caller, "export.delete", export_id, before=before)
    return view.Deleted(id=export_id, object="tunepool.export")
