"""/ui/files: what the project has brought, what the check found, and a form to bring more."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request, Response

from api.deps import DoorDep
from api.paging import After
from api.routes import files as file_routes
from api.ui import rendering, visits
from api.ui.visits import FilesOrderer, FilesVisitor, ProvenForm, SubmittedForm

router = APIRouter(prefix="/ui/files", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
UPLOAD: Final = "upload"


@router.get("")
def files_page(
    request: Request,
    door: DoorDep,
    visit: FilesVisitor,
    after: After = None,
) -> Response:
    listed = file_routes.list_files(door, visit.caller, after=after, limit=ROWS)
    return rendering.page(request, visit, "files.html", files=listed.data, more=listed.has_more, after=after)


@router.post("")
async def upload_file(
    request: Request,
    door: DoorDep,
    visit: FilesOrderer,
    proof: Annotated[str, Query(max_length=100)] = "",
    then: Literal["file", "new"] = "file",
) -> Response:
    """The proof stands in the address, and is good for uploads only: the form itself is a stream to the store.

    `then`: the page to go on to, the file's own or the form of a new job on it.
    """
    visits.must_come_from_here(request)
    visit.must_prove(proof, act=UPLOAD)
    request.state.form = SubmittedForm({}, page="/ui/new" if then == "new" else None)
    file = await file_routes.upload_file(request, door, visit.caller)
    return visits.back(f"/ui/new?file={file.id}" if then == "new" else f"/ui/files/{file.id}")


@router.get("/{file_id}")
def file_page(file_id: str, request: Request, door: DoorDep, visit: FilesVisitor) -> Response:
    return rendering.page(request, visit, "file.html", file_=file_routes.retrieve_file(file_id, door, visit.caller))


@router.get("/{file_id}/content")
async def file_content(file_id: str, request: Request, door: DoorDep, visit: FilesVisitor) -> Response:
    return await file_routes.file_content(file_id, request, door, visit.caller)


@router.post("/{file_id}/delete")
def delete_file(file_id: str, door: DoorDep, visit: FilesOrderer, form: ProvenForm) -> Response:
    file_routes.delete_file(file_id, door, visit.caller)
    return visits.back("/ui/files")
