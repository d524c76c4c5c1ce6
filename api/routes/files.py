"""/v1/files: uploads, and files that jobs made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api.deps import Door, DoorDep, FilesReader, FilesWriter
from api.uploads import FormStream, Received
from api.views import file_views, view
from shared.errors import Invalid, LimitReached, TunepoolError, Unavailable
from shared.ids import new_id
from shared.products import files, quota
from shared.products.files import Upload
from shared.rows.kinds import NAMES, is_offered, kind_of
from shared.store import layout
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/files", tags=["files"])

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
FORM_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("", response_model=file_views.File, openapi_extra=FORM_SCHEMA)
async def upload_file(request: Request, door: DoorDep, caller: FilesWriter) -> file_views.File:
    """Stream a file into the store. A fine-tuning file is then checked line by line (`status`)."""
    file_id = new_id("file-")
    key = layout.file_key(caller.project_id, file_id)
    form = FormStream(request, max_file_bytes=door.settings.max_file_bytes)
    await run_in_threadpool(_look_for_room, door, caller)
    await _store(door, key, form)
    try:
        upload = _upload(form.received, file_id=file_id, key=key)
    except TunepoolError:
        await run_in_threadpool(door.store.delete, [key])
        raise
    return await run_in_threadpool(_keep, door, caller, upload)


def _look_for_room(door: Door, caller: Caller) -> None:
    """Nothing is streamed that could not be kept. Raises LimitReached."""
    with door.session() as session:
        quota.refuse_when_full(session, caller.project_id, quota.quota_of(door.settings))


async def _store(door: Door, key: str, form: FormStream) -> None:
    faults: list[TunepoolError] = []

    async def chunks() -> AsyncIterator[bytes]:
        # The store wraps what its source raises; ours must come out as it went in.
        try:
            async for chunk in form.chunks():
                yield chunk
        except TunepoolError as error:
            faults.append(error)
            raise

    try:
        await door.store.put_stream(key, chunks())
    except BaseException:
        if faults:
            raise faults[0] from None
        raise


def _upload(received: Received, *, file_id: str, key: str) -> Upload:
    fields = dict(received.fields)
    purpose = fields.pop("purpose", None)
    if purpose is None:
        raise Invalid("Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        raise Invalid(
            f"Invalid value for 'purpose': must be one of {', '.join(PURPOSES)}, not '{purpose[:100]}'.",
            param="purpose",
        )
    expires_after = _expiry(fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None))
    if fields:
        name = sorted(fields)[0]
        raise Invalid(
            f"Unknown parameter: '{name[:100]}'. Known here: file, purpose, expires_after.",
            param=name[:100],
            code="unknown_parameter",
        )
    if received.bytes == 0:
        raise Invalid("The file is empty.", param="file", code="empty_file")
    assert received.filename is not None
    if purpose == "fine-tune" and not is_offered(received.filename):
        raise Invalid(
            f"A fine-tuning file must have a name ending in {NAMES}, not '{received.filename}'.",
            param="file",
            code="invalid_file_format",
        )
    return Upload(
        id=file_id,
        filename=received.filename,
        purpose=purpose,
        bytes=received.bytes,
        sha256=received.sha256,
        key=key,
        expires_after=expires_after,
        packed=purpose == "fine-tune" and kind_of(received.head, filename=received.filename) != "lines",
    )


def _expiry(anchor: str | None, text: str | None) -> timedelta | None:
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise Invalid("expires_after.anchor must be 'created_at'.", param="expires_after.anchor")
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 10 and 3600 <= int(text) <= 2_592_000):
        raise Invalid("expires_after.seconds must be an integer from 3600 to 2592000.", param="expires_after.seconds")
    return timedelta(seconds=int(text))


def _keep(door: Door, caller: Caller, upload: Upload) -> file_views.File:
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
    after: Annotated[str | None, Query(max_length=100)] = None,
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


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=view.BYTES)
async def file_content(file_id: str, door: DoorDep, caller: FilesReader) -> StreamingResponse:
    """The bytes, as they were uploaded."""

    def look() -> tuple[str, str, int]:
        with door.session() as session:
            row = files.find(session, file_id, project_id=caller.project_id)
            return row.key, row.filename, row.bytes

    key, filename, size = await run_in_threadpool(look)
    return StreamingResponse(
        await door.store.stream(key), media_type="application/octet-stream", headers=attachment(filename, size=size)
    )


def attachment(filename: str, *, size: int | None = None) -> dict[str, str]:
    """Headers of a download: never shown in place, whatever it holds."""
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename)}",
        "X-Content-Type-Options": "nosniff",
    }
    return headers if size is None else {**headers, "Content-Length": str(size)}


@router.delete("/{file_id}", response_model=view.Deleted)
def delete_file(file_id: str, door: DoorDep, caller: FilesWriter) -> view.Deleted:
    """Delete a file that no unfinished job needs."""
    with door.session() as session:
        row = files.delete(session, file_id, project_id=caller.project_id)
        audit.record(session, caller, "file.delete", file_id, before={"bytes": row.bytes, "purpose": row.purpose})
    # The file is gone for everybody; a store that is away just now must not tell the client otherwise. The janitor
    # deletes the bytes of deleted files again.
    with suppress(Unavailable):
        door.store.delete([row.key])
    return view.Deleted(id=file_id, object="file")
