"""Joins the parts of an upload into one file: reads them from the store and writes the file back, piece by piece."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final

import anyio

from api.deps import Door
from api.upload_bodies import CompleteUpload
from api.views import upload_views
from shared.errors import Invalid, NotFound, Unavailable
from shared.products import parted_uploads
from shared.products.files import Upload
from shared.products.parted_uploads import Assembly
from shared.rows.kinds import HEAD_BYTES, kind_of
from shared.store.storage import Store
from shared.store.tables import UploadRow
from shared.tenants.keys import Caller

# To put a file together takes a thread until the store has it. They are not those that answer requests.
AT_ONCE: Final = 4
_ASSEMBLERS: Final = anyio.CapacityLimiter(AT_ONCE)


async def complete(door: Door, caller: Caller, upload_id: str, wanted: CompleteUpload) -> upload_views.PartedUpload:
    """The upload, completed. Raises NotFound, Invalid, Unavailable."""

    def work() -> upload_views.PartedUpload:
        left = _left(door, caller, upload_id, wanted)
        if isinstance(left, Assembly):
            try:
                file = asyncio.run(_assemble(door.store, left, md5=wanted.md5))
            except (NotFound, Unavailable):
                # Another request may have completed it meanwhile, and removed the parts.
                if isinstance(_left(door, caller, upload_id, wanted), Assembly):
                    raise
            else:
                _publish(door, caller, upload_id, wanted, file)
        return _completed(door, caller, upload_id, wanted)

    return await anyio.to_thread.run_sync(work, limiter=_ASSEMBLERS)


def _left(door: Door, caller: Caller, upload_id: str, wanted: CompleteUpload) -> Assembly | UploadRow:
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

    def __init__(self, store: Store, part_keys: Sequence[str]) -> None:
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
