"""The trainer's voice: one event per line, appended to `OUT/events.jsonl`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from shared.contract.events import Alive, Level, Message, TrainerEvent

SIGN_SECONDS: Final = 10.0  # signs of life that come faster than this are left out


class Reporter:
    """Writes events in order. Only the first rank of a job has a path; the others are silent."""

    def __init__(
        self, path: Path | None, *, clock: Callable[[], float], ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._ticks = clock, ticks
        self._told_at = ticks()
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file is not None:
            self._end_torn_line(self._file)

    def write(self, event: Callable[..., TrainerEvent], **fields: Any) -> None:
        """Append one event; the line is a single write, so a reader never sees it interleaved with another."""
        if self._file is not None:
            self._told_at = self._ticks()
            os.write(self._file, event(time=self._clock(), **fields).model_dump_json().encode() + b"\n")

    def say(self, message: str, *, level: Level = "info") -> None:
        self.write(Message, message=message, level=level)

    def alive(self, doing: str) -> None:
        """Tell that work goes on, once nothing has been told for a while."""
        if self._ticks() - self._told_at >= SIGN_SECONDS:
            self.write(Alive, doing=doing)

    @staticmethod
    def _end_torn_line(file: int) -> None:
        # An attempt that was killed within a write leaves half a line; the next event must not be glued to it.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
