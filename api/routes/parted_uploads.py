"""/v1/uploads: large files in parts. A lost connection or a killed process costs only the part that was being sent."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from api import assembling
from api.body import RawBody, body_of, form_of, parse
from api.deps import Door, DoorDep, FilesWriter
from api.file_rules import clean_name, refuse_name
from api.upload_bodies import CompleteUpload, CreateUpload
from api.uploads import FormStream, store_form
from api.views import upload_views
from shared.errors import Invalid, TooLarge, TunepoolError, Unavailable
from shared.products import parted_uploads, quota
from shared.products.parted_uploads import MAX_PART_BYTES, Announcement
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

PART_FORM = form_of(["data"], {"data": {"type": "string", "format": "binary"}})


@router.post("", response_model=upload_views.PartedUpload, openapi_extra=body_of(CreateUpload))
def create_upload(caller: FilesWriter, body: RawBody, door: DoorDep) -> upload_views.PartedUpload:
    """Announce a file that comes in parts. It is open for an hour, and its bytes are reserved meanwhile."""
    wanted = parse(body, CreateUpload)
    most = door.settings.max_upload_bytes
    if wanted.bytes > most:
        raise TooLarge(f"An upload has at most {most:,} bytes, not {wanted.bytes:,}.", param="bytes")
    filename = clean_name(wanted.filename)
    refuse_name(filename, purpose=wanted.purpose, param="filename")
    announced = Announcement(
        bytes=wanted.bytes,
        filename=filename,
        mime_type=wanted.mime_type,
        purpose=wanted.purpose,
        file_lives_seconds=None if wanted.expires_after is None else wanted.expires_after.seconds,
    )
    with door.session() as session:
        row = parted_uploads.create(
            session,
            announced,
            project_id=caller.project_id,
            usual=quota.quota_of(door.settings),
            open_seconds=door.settings.upload_seconds,
        )
    return upload_views.upload(row)


@router.post("/{upload_id}/parts", response_model=upload_views.PartOfUpload, openapi_extra=PART_FORM)
async def add_upload_part(
    upload_id: str, request: Request, door: DoorDep, caller: FilesWriter
) -> upload_views.PartOfUpload:
    """Add up to 64 MB. When this answers, the part is kept. The same bytes sent again are the same part."""
    await run_in_threadpool(_look_whether_open, door, caller, upload_id)
    form = FormStream(request, part="data", max_file_bytes=MAX_PART_BYTES)
    row = parted_uploads.new_part(upload_id, project_id=caller.project_id)
    await store_form(door.store, row.key, form)
    row.bytes, row.sha256 = form.received.bytes, form.received.sha256

    def keep() -> upload_views.PartOfUpload:
        mine, key = row.id, row.key
        try:
            _refuse_form(form)
            with door.session() as session:
                kept = parted_uploads.add_part(session, upload_id, row, project_id=caller.project_id)
                answer = upload_views.part(kept)
        except TunepoolError:
            door.store.delete([key])
            raise
        if answer.id != mine:
            door.store.delete([key])
        return answer

    return await run_in_threadpool(keep)


def _look_whether_open(door: Door, caller: Caller, upload_id: str) -> None:
    """Nothing is streamed that nobody could use."""
    with door.session() as session:
        parted_uploads.must_be_open(session, upload_id, project_id=caller.project_id)


def _refuse_form(form: FormStream) -> None:
    for name in sorted(form.received.fields):
        raise Invalid(
            f"Unknown parameter: '{name[:100]}'. A part has 'data' alone.", param=name[:100], code="unknown_parameter"
        )
    if form.received.bytes == 0:
        raise Invalid("The part is empty.", param="data", code="empty_file")


@router.post("/{upload_id}/complete", response_model=upload_views.PartedUpload, openapi_extra=body_of(CompleteUpload))
async def complete_upload(
    upload_id: str, caller: FilesWriter, body: RawBody, door: DoorDep
) -> upload_views.PartedUpload:
    """Make the file of its parts, in this order. Asked again, the answer is the same."""
    wanted = parse(body, CompleteUpload)
    return await assembling.complete(door, caller, upload_id, wanted)


@router.post("/{upload_id}/cancel", response_model=upload_views.PartedUpload)
def cancel_upload(upload_id: str, door: DoorDep, caller: FilesWriter) -> upload_views.PartedUpload:
    """Give an upload up: its parts go, and the room that it held."""
    with door.session() as session:
        row = parted_uploads.cancel(session, upload_id, project_id=caller.project_id)
        spent = parted_uploads.part_keys(session, row)
    with suppress(Unavailable):  # the janitor deletes them again
        door.store.delete(spent)
    return upload_views.upload(row)
