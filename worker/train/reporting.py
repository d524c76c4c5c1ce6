"""The trainer's voice: one event per line, appended to `OUT/events.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.contract.events import Level, Message, TrainerEvent


class Reporter:
    """Writes events in order. Only the first rank of a job has a path; the others are silent."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file is not None:
            self._end_torn_line(self._file)

    def write(self, event: Callable[..., TrainerEvent], **fields: Any) -> None:
        """Append one event; the line is a single write, so a reader never sees it interleaved with another."""
        if self._file is not None:
            os.write(self._file, event(time=self._clock(), **fields).model_dump_json().encode() + b"\n")

    def say(self, message: str, *, level: Level = "info") -> None:
        self.write(Message, message=message, level=level)

    @staticmethod
    def _end_torn_line(file: int) -> None:
        # An attempt that was killed within a write leaves half a line; the next event must not be glued to it.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
