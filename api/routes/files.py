"""/v1/files: uploads, and files that jobs made."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from api.body import form_of
from api.deps import Door, DoorDep, FilesReader, FilesWriter
from api.downloads import PARTS, sent
from api.file_rules import MAX_LIFE_SECONDS, MIN_LIFE_SECONDS, PURPOSES
from api.paging import After
from api.upload_form import upload_of
from api.uploads import FormStream, store_form
from api.views import file_views, view
from shared.errors import LimitReached, TunepoolError, Unavailable
from shared.ids import new_id
from shared.products import files, quota
from shared.products.files import Upload
from shared.store import layout
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/files", tags=["files"])

FORM_SCHEMA = form_of(
    ["file", "purpose"],
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_LIFE_SECONDS,
            "maximum": MAX_LIFE_SECONDS,
        },
    },
)


@router.post("", response_model=file_views.File, openapi_extra=FORM_SCHEMA)
async def upload_file(request: Request, door: DoorDep, caller: FilesWriter) -> file_views.File:
    """Stream a file into the store. A fine-tuning file is then checked line by line (`status`)."""
    file_id = new_id("file-")
    key = layout.file_key(caller.project_id, file_id)
    form = FormStream(request, max_file_bytes=door.settings.max_file_bytes)
    await run_in_threadpool(_look_for_room, door, caller)
    await store_form(door.store, key, form)
    try:
        received = form.received
        assert received.filename is not None
        upload = upload_of(
            received.fields,
            filename=received.filename,
            size=received.bytes,
            sha256=received.sha256,
            head=received.head,
            key=key,
            file_id=file_id,
        )
    except TunepoolError:
        await run_in_threadpool(door.store.delete, [key])
        raise
    return await run_in_threadpool(keep, door, caller, upload)


def _look_for_room(door: Door, caller: Caller) -> None:
    """Nothing is streamed that could not be kept. Raises LimitReached."""
    with door.session() as session:
        quota.refuse_when_full(session, caller.project_id, quota.quota_of(door.settings))


def keep(door: Door, caller: Caller, upload: Upload) -> file_views.File:
    """Note a file whose bytes lie in the store. Raises LimitReached, and then they are deleted."""
    usual = quota.quota_of(door.settings)
    try:
        with door.session() as session:
            quota.take_turn(session, caller.project_id)
            quota.refuse_when_full(session, caller.project_id, usual, adding=upload.bytes)
            row = files.add(session, upload, project_id=caller.project_id)
    except LimitReached:
        door.store.delete([upload.key])
        raise
    door.ring("cpu")
    return file_views.file(row)


@router.get("", response_model=file_views.FilePage)
def list_files(
    door: DoorDep,
    caller: FilesReader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=100)] = None,
    sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="Files of these bytes only.")] = None,
) -> file_views.FilePage:
    """Files of the project."""
    with door.session() as session:
        rows, more = files.page(
            session,
            project_id=caller.project_id,
            after=after,
            limit=limit,
            order=order,
            purpose=purpose,
            sha256=sha256,
        )
    data = [file_views.file(row) for row in rows]
    return file_views.FilePage(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.get("/{file_id}", response_model=file_views.File)
def retrieve_file(file_id: str, door: DoorDep, caller: FilesReader) -> file_views.File:
    """One file's facts."""
    with door.session() as session:
        return file_views.file(files.find(session, file_id, project_id=caller.project_id))


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=PARTS)
async def file_content(file_id: str, request: Request, door: DoorDep, caller: FilesReader) -> Response:
    """The bytes, as they were uploaded. `Range` of one range is understood."""

    def look() -> tuple[str, str]:
        with door.session() as session:
            row = files.find(session, file_id, project_id=caller.project_id)
            return row.key, row.filename

    key, filename = await run_in_threadpool(look)
    return await sent(key, filename, door=door, request=request)


@router.delete("/{file_id}", response_model=view.Deleted)
def delete_file(
    file_id: str,
    door: DoorDep,
    caller: FilesWriter,
    force: Annotated[bool, Query(description="Also what the model of an alias was made of.")] = False,
) -> view.Deleted:
    """Delete a file that no unfinished job needs, and that no alias stands on."""
    with door.session() as session:
        row = files.delete(session, file_id, project_id=caller.project_id, force=force)
        before = {"bytes": row.bytes, "purpose": row.purpose, **({"force": True} if force else {})}
        audit.record(session, caller, "file.delete", file_id, before=before)
    # The file is gone for everybody; a store that is away just now must not tell the client otherwise. The janitor
    # deletes the bytes of deleted files again.
    with suppress(Unavailable):
        door.store.delete([row.key])
    return view.Deleted(id=file_id, object="file")
