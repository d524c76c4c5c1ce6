"""Limits how many requests one caller may have in a process at a time, so that a flood does not stop the others.

All requests of a process share its interpreter. A caller that has more of them in work than a share waits with the next
one; nobody else does. Whoever shows no key gets a few answers a second, and later ones a little later: such answers are
the same for all, and nobody needs them often.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

IN_WORK: Final = 16  # requests of one key that a process works at, before the first byte of their answers
FIRST_BYTES: Final = 65_536  # of a body: as much as the server takes from a socket anyhow
KEYLESS_PER_SECOND: Final = 20.0
KEYLESS_BURST: Final = 20
LONGEST_WAIT_SECONDS: Final = 2.0  # of the keyless: a probe still comes in time
# A longer body is looked at after this also when nothing has come: for a key that has ended it is not read at all.
LOOK_SECONDS: Final = 1.0
_MOST_ADDRESSES: Final = 10_000
_BODIES: Final = frozenset({b"content-length", b"transfer-encoding"})
_KEYS: Final = frozenset({b"authorization", b"api-key"})
# They wait for others, for minutes maybe, and have bounds of their own.
_PATIENT: Final = ("/v1/chat/completions", "/v1/completions", "/v1/files", "/v1/tunepool/objects/")


@dataclass
class _Gate:
    """One caller's requests: so many in work, and those that wait for one of them to end."""

    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_WORK))
    inside: int = 0


def _never() -> bool:
    return False


class ConcurrencyLimit:
    """Plain ASGI. A request is in work until its answer begins: a stream holds nothing."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._gates: dict[bytes, _Gate] = {}
        self._paid: dict[str, float] = {}  # address -> until when its answers without a key are paid for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key, body = None, {}
        for name, value in scope["headers"]:
            if name in _BODIES:
                body[name] = value
            elif name in _KEYS and key is None:
                key = value
        if key is None:
            await asyncio.sleep(self.wait_seconds(scope["client"][0] if scope.get("client") else ""))
            await self._app(scope, receive, send)
            return
        begun = await _begun(receive, seconds=LOOK_SECONDS if _is_long(body) else None) if body else receive
        if begun is None:
            return
        if scope["path"].startswith(_PATIENT):
            await self._app(scope, begun, send)
        else:
            await self._in_turn(key, scope, begun, send)

    async def _in_turn(self, key: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = _Gate()
        gate.inside += 1
        held = False

        async def answered(message: Message) -> None:
            nonlocal held
            if held:
                held = False
                gate.free.release()
            await send(message)

        try:
            await gate.free.acquire()
            held = True
            if not scope.get("gone", _never)():  # of a flood most have left by now
                await self._app(scope, receive, answered)
        finally:
            if held:
                gate.free.release()
            gate.inside -= 1
            if gate.inside == 0:
                self._gates.pop(key, None)

    def wait_seconds(self, address: str) -> float:
        """How long this answer without a key has to wait; 0 for the first ones of a second."""
        now, each = self._clock(), 1 / KEYLESS_PER_SECOND
        if len(self._paid) >= _MOST_ADDRESSES:
            self._paid.clear()
        paid = max(now, self._paid.get(address, now)) + each
        wait = max(0.0, paid - now - KEYLESS_BURST * each)
        self._paid[address] = min(paid, now + KEYLESS_BURST * each + LONGEST_WAIT_SECONDS)
        return min(wait, LONGEST_WAIT_SECONDS)


def _is_long(body: Mapping[bytes, bytes]) -> bool:
    """Whether its headers announce a body that is longer than its beginning, or do not say how long it is."""
    length = body.get(b"content-length", b"")
    return not length.isdigit() or int(length) > FIRST_BYTES


async def _begun(receive: Receive, *, seconds: float | None) -> Receive | None:
    """Wait for a body, or its first 64 KiB, and give it again; None: the client left before.

    `seconds`: no longer, and then what has come is given.
    """
    clock, pieces = asyncio.get_running_loop().time, deque[Message]()
    until = None if seconds is None else clock() + seconds
    coming: asyncio.Future[Message] | None = None
    size, more = 0, True
    while more and size < FIRST_BYTES:
        if until is None:
            piece = await receive()
        else:  # as a task, which whoever reads on finds again
            coming = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait({coming}, timeout=max(0.0, until - clock()))
            if not done:
                break
            piece, coming = coming.result(), None
        if piece["type"] != "http.request":
            return None
        pieces.append(piece)
        size += len(piece.get("body", b""))
        more = piece.get("more_body", False)

    async def again() -> Message:
        nonlocal coming
        if pieces:
            return pieces.popleft()
        if coming is not None:
            late, coming = coming, None
            return await late
        return await receive()

    return again
