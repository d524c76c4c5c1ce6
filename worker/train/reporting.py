"""Writes the trainer's events: one per line, appended to `OUT/events.jsonl`, and in words to the trainer's log."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from shared.contract.events import Alive, Level, Message, TrainerEvent

SIGN_SECONDS: Final = 10.0  # signs of life that come faster than this are left out
WATCH_SECONDS: Final = 2.0  # between two looks at whether this process works
PHASE_SECONDS: Final = 3600.0  # a phase that is longer gives no more signs: busy for ever is stuck, too
BUSY_SHARE: Final = 0.02  # of a core; a process that waits for nothing that comes uses less


@dataclass(frozen=True)
class ResourceUse:
    """What this process has used since it began."""

    cpu_seconds: float
    transfers: int  # blocks read and written, and pages fetched from a disk

    @classmethod
    def now(cls) -> ResourceUse:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        transfers = usage.ru_inblock + usage.ru_oublock + usage.ru_majflt
        return cls(cpu_seconds=usage.ru_utime + usage.ru_stime, transfers=transfers)

    def works_since(self, earlier: ResourceUse, *, seconds: float) -> bool:
        """Whether something was computed, read or written in the `seconds` between."""
        computed = self.cpu_seconds - earlier.cpu_seconds > BUSY_SHARE * seconds
        return computed or self.transfers > earlier.transfers


class Reporter:
    """Writes events in order. Only the first rank of a job has a path; the others are silent.

    Args:
        log: where each event is told in words, too; None: nowhere.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float],
        ticks: Callable[[], float] = time.monotonic,
        log: TextIO | None = None,
    ) -> None:
        self._clock, self._ticks, self._log = clock, ticks, log
        self._told_at = ticks()
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file is not None:
            self._end_torn_line(self._file)

    def write(self, event: Callable[..., TrainerEvent], **fields: Any) -> None:
        """Append one event; the line is a single write, so a reader never sees it interleaved with another."""
        if self._file is not None:
            self._told_at = self._ticks()
            made = event(time=self._clock(), **fields)
            os.write(self._file, made.model_dump_json().encode() + b"\n")
            if self._log is not None:
                with suppress(OSError):  # nobody reads it any more: the events still count
                    print(in_words(made), file=self._log, flush=True)

    def say(self, message: str, *, level: Level = "info") -> None:
        self.write(Message, message=message, level=level)

    def alive(self, doing: str) -> None:
        """Tell that work goes on, once nothing has been told for a while."""
        if self._ticks() - self._told_at >= SIGN_SECONDS:
            self.write(Alive, doing=doing)

    @contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """Tell that work goes on while upstream's code runs, which gives no sign itself.

        A thread looks whether this process computes, reads or writes. One that waits for ever gives no sign and is
        taken for stuck, as before; one that is busy for more than `PHASE_SECONDS` is, too.
        """
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(doing, over), name="signs-of-life", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    def _watch(self, doing: str, over: threading.Event) -> None:
        began, before = self._ticks(), ResourceUse.now()
        while not over.wait(WATCH_SECONDS) and self._ticks() - began < PHASE_SECONDS:
            now = ResourceUse.now()
            if now.works_since(before, seconds=WATCH_SECONDS):
                self.alive(doing)
            before = now

    @staticmethod
    def _end_torn_line(file: int) -> None:
        # An attempt that was killed within a write leaves half a line; the next event must not be glued to it.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")


def in_words(event: TrainerEvent) -> str:
    """An event as a line of a log: its time in UTC, and its message, or its kind and values."""
    moment = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(event, Message):
        return f"{moment} {' '.join(event.message.split())}"
    values = event.model_dump(mode="json", exclude={"time", "type"}, exclude_none=True)
    shown = (f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())
    return f"{moment} {' '.join((event.type, *shown))}"


class TraineeReporter(Reporter):
    """The voice of one run among several that take turns: while it works, those that wait for theirs are not stuck."""

    def __init__(self, path: Path, *, waiting: Callable[[], Iterable[Reporter]], clock: Callable[[], float]) -> None:
        super().__init__(path, clock=clock)
        self._waiting = waiting

    def alive(self, doing: str) -> None:
        super().alive(doing)
        for other in self._waiting():
            if other is not self:
                Reporter.alive(other, "step")
