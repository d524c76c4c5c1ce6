"""Hashes uploads beside the event loop, which all requests share: a core hashes about a gigabyte a second."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

# Of smaller pieces hashing costs less than to hand them over.
APART_BYTES: Final = 64 * 1024
# They are not those that answer requests. Hashing lets go of the interpreter, so two may keep two cores busy.
_HASHERS: Final = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hashing")


class Sha256:
    """The SHA-256 of pieces in their order. At most one piece is being hashed, and held for it."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self._at_work: asyncio.Future[Any] | None = None

    async def add(self, piece: bytes) -> None:
        """Begin to hash `piece`, once the one before is done."""
        await self._done()
        if len(piece) < APART_BYTES:
            self._state.update(piece)
        else:
            self._at_work = asyncio.get_running_loop().run_in_executor(_HASHERS, self._state.update, piece)

    async def hexdigest(self) -> str:
        """Of all pieces, in hexadecimal."""
        await self._done()
        return self._state.hexdigest()

    async def _done(self) -> None:
        if self._at_work is not None:
            await self._at_work
            self._at_work = None
