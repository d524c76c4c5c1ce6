"""Tells whether this process can serve. It looks once a second at most, because anybody may ask without a key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.errors import TunepoolError

LOOK_SECONDS: Final = 1.0
# Each is a part that is away, and the same for all who ask.
FAULTS: Final = (TunepoolError, OperationalError, InterfaceError, PoolTimeout)
Seen = TypeVar("Seen")


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[Seen]):
    """What a look has found, or why it could not look; and when it was begun."""

    begun: float
    seen: Seen | None
    fault: Exception | None


class SharedLook(Generic[Seen]):
    """One look a second, shared by all callers of one event loop: those that come meanwhile wait for the same."""

    def __init__(self, look: Callable[[], Awaitable[Seen]], *, seconds: float = LOOK_SECONDS) -> None:
        self._look, self._seconds = look, seconds
        self._running: asyncio.Task[_Outcome[Seen]] | None = None
        self._last: _Outcome[Seen] | None = None

    async def take(self) -> Seen:
        """What the last look found. Raises what it raised."""
        if self._last is None or time.monotonic() - self._last.begun >= self._seconds:
            # Shielded: a caller that leaves takes the others' look with it otherwise.
            self._last = await asyncio.shield(self._task())
        if self._last.fault is not None:
            raise self._last.fault.with_traceback(None)
        assert self._last.seen is not None
        return self._last.seen

    def _task(self) -> asyncio.Task[_Outcome[Seen]]:
        loop = asyncio.get_running_loop()
        if self._running is None or self._running.done() or self._running.get_loop() is not loop:
            self._running = loop.create_task(self._outcome())
        return self._running

    async def _outcome(self) -> _Outcome[Seen]:
        begun = time.monotonic()
        try:
            return _Outcome(begun, await self._look(), None)
        except FAULTS as fault:
            return _Outcome(begun, None, fault)
