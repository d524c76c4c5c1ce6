"""Shows on stderr how much of a file is sent or received: a bar in a terminal, elsewhere a line every ten seconds.

What takes less time says nothing.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from tunepool.printing import printable

LINE_SECONDS: Final = 10.0
MIB: Final = 2**20


class Transfer:
    """One file on its way. `total`: its bytes; None, nobody knows."""

    def __init__(
        self,
        name: str,
        total: int | None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._clock = printable(name), total, clock
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._next = clock() + LINE_SECONDS

    def __enter__(self) -> Transfer:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.fields[name]}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=self._total, name=self._name)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, count: int) -> None:
        """`count` bytes are there. A transfer that begins again comes with a smaller number."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)
        elif self._clock() >= self._next:
            self._next = self._clock() + LINE_SECONDS
            of = "" if self._total is None else f" of {self._total / MIB:,.0f}"
            self._console.print(Text(f"{self._name}: {count / MIB:,.0f}{of} MiB"), soft_wrap=True)


class CountedFile(io.FileIO):
    """A file that tells how far it has been read. A client that begins again seeks, and the count goes back."""

    def __init__(self, path: Path, at: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._at = at

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(-1 if size is None else size)
        self._at(self.tell())
        return chunk
