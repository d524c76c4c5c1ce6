"""The way from a request to a playground: one TCP connection for one question, which ends with the request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final

import structlog
from fastapi import Request
from pydantic import ValidationError

from shared.contract.generation import LINE_BYTES, SAID, Begun, Call, Called, Declined, Ended, Piece, Question, Target
from shared.errors import Invalid, NotYet, TunepoolError
from shared.fleet.playgrounds import PlaygroundAddress

log = structlog.get_logger()

CONNECT_SECONDS: Final = 10.0  # a busy process is late with its own end of the connection


class PlaygroundConnection:
    """An open question. `begin` first, then `rest`; `close` withdraws whatever was not said yet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def begin(self, *, seconds: float) -> Begun:
        """Wait until the answer begins.

        Raises:
            NotYet: it does not begin in time, or cannot now.
            Invalid: it never can; says why.
        """
        try:
            async with asyncio.timeout(seconds):
                reply = await self._next()
        except TimeoutError:
            raise NotYet(
                f"The answer did not begin within {seconds:g} seconds: the playground loads the model, or answers "
                "others. Try again shortly.",
                code="playground_busy",
            ) from None
        if not isinstance(reply, Begun):
            raise _lost()
        return reply

    async def rest(self) -> AsyncIterator[Piece | Called | Ended]:
        """The answer, piece by piece, and its end. Raises NotYet, Invalid: it ends here."""
        while True:
            reply = await self._next()
            if not isinstance(reply, Piece | Called | Ended):
                raise _lost()
            yield reply
            if isinstance(reply, Ended):
                return

    async def _next(self) -> Begun | Piece | Called | Ended:
        try:
            line = await self._reader.readline()
            reply = SAID.validate_json(line)
        except (ValidationError, ValueError, ConnectionError) as error:
            raise _lost() from error
        if isinstance(reply, Declined):
            raise _as_error(reply)
        if not isinstance(reply, Begun | Piece | Called | Ended):
            raise _lost()
        return reply

    def close(self) -> None:
        self._writer.close()


async def ask(places: Sequence[PlaygroundAddress], target: Target, question: Question) -> PlaygroundConnection:
    """Ask the first playground that takes the connection. Raises NotYet when none does."""
    for place in places:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(place.address, place.port, limit=LINE_BYTES)
            call = Call(token=place.token, target=target, question=question)
            writer.write(call.model_dump_json().encode() + b"\n")
            return PlaygroundConnection(reader, writer)
        log.warning("playground.unreachable", address=place.address, port=place.port)
    raise NotYet(
        "No playground answers. `tunepool-server up` runs one; elsewhere an administrator starts "
        "`tunepool-server playground` on a host of the pool.",
        code="playground_unavailable",
    )


async def left(request: Request) -> None:
    """Returns when the client has left. Its body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _lost() -> TunepoolError:
    return NotYet("The connection to the playground was lost. Try again.", code="playground_unavailable")


def _as_error(declined: Declined) -> TunepoolError:
    kind = NotYet if declined.passing else Invalid
    return kind(declined.message, param=declined.param, code=declined.code)
