"""What a program prints: handed on as it comes, bounded, with its last words kept in memory."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Protocol

LOG_BYTES: Final = 16 * 1024 * 1024
LOG_BYTES_PER_SECOND: Final = 1024 * 1024
TAIL_BYTES: Final = 8 * 1024


class LogSink(Protocol):
    """Takes what a program prints, and bounds it itself. Neither method raises."""

    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> None: ...


class FirstBytes:
    """The first megabytes of what is printed, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("wb")
        self._path = file
        self._room = LOG_BYTES

    def write(self, chunk: bytes) -> None:
        if self._room > 0:
            self._room -= len(chunk)
            with contextlib.suppress(OSError):  # a full disk ends no program's output
                self._file.write(chunk)
                self._file.flush()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def kept(self) -> bytes:
        """What the file holds, once it is finished."""
        with contextlib.suppress(OSError):
            return self._path.read_bytes()
        return b""


class PrintedLog(threading.Thread):
    """Hands on what a trainer prints, and keeps its last words in memory.

    It reads no faster than a human could want, so a flood slows its author down and nobody else.
    """

    def __init__(self, stream: IO[bytes], sink: LogSink, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="trainer-log", daemon=True)
        self._stream = stream
        self._sink = sink
        self._clock = clock
        self._tail: deque[bytes] = deque(maxlen=16)
        self._turn = threading.Lock()  # the sink changes between two chunks
        self._over = False

    def run(self) -> None:
        started, seen = self._clock(), 0
        with self._stream:
            while chunk := os.read(self._stream.fileno(), 64 * 1024):
                self._tail.append(chunk)
                with self._turn:
                    self._sink.write(chunk)
                seen += len(chunk)
                ahead = seen / LOG_BYTES_PER_SECOND - (self._clock() - started) - 1.0
                if ahead > 0:
                    time.sleep(min(ahead, 1.0))
        with self._turn:
            self._sink.finish()
            self._over = True

    def hand_to(self, sink: LogSink) -> None:
        """What was printed so far, and whatever comes, goes to `sink`."""
        with self._turn:
            before, self._sink = self._sink, sink
            before.finish()
            if isinstance(before, FirstBytes):
                sink.write(before.kept())
            if self._over:
                sink.finish()

    def tail(self) -> str:
        """The last words, as text."""
        return b"".join(self._tail)[-TAIL_BYTES:].decode("utf-8", "replace")
