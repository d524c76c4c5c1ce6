"""A TCP relay with weather: connections are cut, swallowed, delayed or throttled between a process and its server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: a close is a reset


@dataclass(frozen=True, slots=True)
class Weather:
    """`silent` keeps connections open and lets nothing through: a half-open line, a hung server, a dropped route."""

    refuse: bool = False
    silent: bool = False
    delay_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    reset_after_bytes: float = float("inf")


FAIR = Weather()


def _as_sent(chunk: bytes) -> bytes:
    return chunk


class Proxy:
    """Listens on a port of this machine and relays to `upstream`, a socket's path or (host, port).

    What clients send goes through `alter` first.
    """

    def __init__(self, upstream: Path | tuple[str, int], *, alter: Callable[[bytes], bytes] = _as_sent) -> None:
        self._upstream = upstream
        self._alter = alter
        self._weather = FAIR
        self._serial = self._deaf_below = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def set(self, weather: Weather) -> None:
        """From now on, for open connections too. What was held back by silence comes through when it ends."""
        self._weather = weather

    def forget(self) -> None:
        """Let nothing more through the connections that are open now; later ones are well. For good."""
        self._deaf_below = self._serial

    def cut(self) -> None:
        """Reset every open connection."""
        self._call(self._reset_all())

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _end(self) -> None:
        self._server.close()
        await self._reset_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _reset_all(self) -> None:
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            if self._weather.refuse:
                return
            await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            return
        finally:
            _reset(writer)
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(self._upstream, Path):
            far_reader, far_writer = await asyncio.open_unix_connection(self._upstream)
        else:
            far_reader, far_writer = await asyncio.open_connection(*self._upstream)
        self._open.add(far_writer)
        self._serial += 1
        pumps = [
            asyncio.ensure_future(pump)
            for pump in (
                self._pump(reader, far_writer, self._serial, alter=self._alter),
                self._pump(far_reader, writer, self._serial, alter=_as_sent),
            )
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            far_writer.close()
            self._open.discard(far_writer)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        serial: int,
        *,
        alter: Callable[[bytes], bytes],
    ) -> None:
        passed = 0
        while chunk := await source.read(16 * 1024):
            while self._weather.silent or serial <= self._deaf_below:
                await asyncio.sleep(0.02)
            passed += len(chunk)
            if self._weather.refuse or passed > self._weather.reset_after_bytes:
                return
            await asyncio.sleep(self._weather.delay_seconds + len(chunk) / self._weather.bytes_per_second)
            sink.write(alter(chunk))
            await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
