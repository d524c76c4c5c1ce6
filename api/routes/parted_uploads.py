"""/v1/uploads: large files in parts. A lost line or a killed process costs the part that was on its way, no other."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

import anyio
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from api.body import RawBody, body_of, parse
from api.deps import Door, DoorDep, FilesWriter
from api.file_rules import clean_name, refuse_name
from api.upload_bodies import CompleteUpload, CreateUpload
from api.uploads import FormStream, store_form
from api.views import upload_views
from shared.errors import Invalid, TooLarge, TunepoolError, Unavailable
from shared.products import parted_uploads, quota
from shared.products.files import Upload
from shared.products.parted_uploads import MAX_PART_BYTES, Announcement, Assembly
from shared.rows.kinds import HEAD_BYTES, kind_of
from shared.store.storage import Store
from shared.store.tables import UploadRow
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

# To put a file together takes a thread until the store has it. They are not those that answer requests.
AT_ONCE: Final = 4
_ASSEMBLERS: Final = anyio.CapacityLimiter(AT_ONCE)
PART_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


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

    def complete() -> upload_views.PartedUpload:
        work = _assembly(door, caller, upload_id, wanted)
        if isinstance(work, Assembly):
            try:
                file = asyncio.run(_assemble(door.store, work, md5=wanted.md5))
            except Unavailable:
                # Another request may have completed it meanwhile, and removed the parts.
                if isinstance(_assembly(door, caller, upload_id, wanted), Assembly):
                    raise
            else:
                _publish(door, caller, upload_id, wanted, file)
        return _completed(door, caller, upload_id, wanted)

    return await anyio.to_thread.run_sync(complete, limiter=_ASSEMBLERS)


def _assembly(door: Door, caller: Caller, upload_id: str, wanted: CompleteUpload) -> Assembly | UploadRow:
    with door.session() as session:
        return parted_uploads.assembly(session, upload_id, wanted.part_ids, project_id=caller.project_id)


def _publish(door: Door, caller: Caller, upload_id: str, wanted: CompleteUpload, file: Upload) -> None:
    """Record the file, unless another request has ended the upload meanwhile: then these bytes are for nobody."""
    with door.session() as session:
        done = parted_uploads.complete(session, upload_id, wanted.part_ids, file, project_id=caller.project_id)
        spent = [file.key] if done is None else parted_uploads.part_keys(session, done)
    with suppress(Unavailable):  # the janitor deletes them again
        door.store.delete(spent)
    door.ring("cpu")


def _completed(door: Door, caller: Caller, upload_id: str, wanted: CompleteUpload) -> upload_views.PartedUpload:
    with door.session() as session:
        row = parted_uploads.assembly(session, upload_id, wanted.part_ids, project_id=caller.project_id)
        assert isinstance(row, UploadRow)
        return upload_views.upload(row, file=parted_uploads.file_of(session, row))


class _Whole:
    """The bytes of a file out of its parts, counted and hashed as they go."""

    def __init__(self, store: Store, part_keys: tuple[str, ...]) -> None:
        self._store, self._keys = store, part_keys
        self.bytes, self.head = 0, b""
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for key in self._keys:
            async for chunk in await self._store.stream(key):
                self.bytes += len(chunk)
                self.sha256.update(chunk)
                self.md5.update(chunk)
                if len(self.head) < HEAD_BYTES:
                    self.head = (self.head + chunk)[:HEAD_BYTES]
                yield chunk


async def _assemble(store: Store, work: Assembly, *, md5: str | None) -> Upload:
    """The file as one object. It runs in a loop of its own, where hashing delays no request.

    Raises Unavailable, Invalid when its hash is not the one that was given.
    """
    whole, announced = _Whole(store, work.part_keys), work.announced
    await store.put_stream(work.key, aiter(whole))
    if md5 is not None and whole.md5.hexdigest() != md5.lower():
        store.delete([work.key])
        raise Invalid(
            f"The parts in this order have the MD5 {whole.md5.hexdigest()}, not {md5.lower()}.",
            param="md5",
            code="checksum_mismatch",
        )
    lives = announced.file_lives_seconds
    return Upload(
        id=work.file_id,
        filename=announced.filename,
        purpose=announced.purpose,
        bytes=whole.bytes,
        sha256=whole.sha256.hexdigest(),
        key=work.key,
        expires_after=None if lives is None else timedelta(seconds=lives),
        packed=announced.purpose == "fine-tune" and kind_of(whole.head, filename=announced.filename) != "lines",
    )


@router.post("/{upload_id}/cancel", response_model=upload_views.PartedUpload)
def cancel_upload(upload_id: str, door: DoorDep, caller: FilesWriter) -> upload_views.PartedUpload:
    """Give an upload up: its parts go, and the room that it held."""
    with door.session() as session:
        row = parted_uploads.cancel(session, upload_id, project_id=caller.project_id)
        spent = parted_uploads.part_keys(session, row)
    with suppress(Unavailable):  # the janitor deletes them again
        door.store.delete(spent)
    return upload_views.upload(row)
