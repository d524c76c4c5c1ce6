"""The answers of all models, from processes that know nothing of this project (examples/answers.py).

A small model's next token is mostly many small steps in a row, of which two threads make little more than one. Two
processes of half the rows each make twice as much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from examples.stack import StackFailed

MOST_PARTS: Final = 2  # each holds a model of its own
LOOK_SECONDS: Final = 0.2


class Asking:
    """Asks from the moment it is made. Leaving it ends what still runs.

    Args:
        commands: one for each part of the rows. Each prints lines of JSON: its `share`, and at last its `rows`.
        threads: of each.
    """

    def __init__(self, commands: Sequence[Sequence[str]], *, threads: int) -> None:
        self.parts = [Part(command, threads=threads) for command in commands]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part in self.parts:
            part.end()

    def rows(self, say: Callable[[str], None]) -> list[dict[str, str]]:
        """Every row with its answers, in the order of the file. Raises StackFailed with what a process said last."""
        while any(part.reads() for part in self.parts):
            say(f"{sum(part.share for part in self.parts) / len(self.parts):.0%}")
            for part in self.parts:
                part.complain()
        by_part = [part.rows() for part in self.parts]
        return [row for turn in zip_longest(*by_part) for row in turn if row is not None]


def asking(base: Path, *, adapter: Path, held_out: Path) -> Asking:
    """Base and tuned model are asked, on all cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    parts = min(cores, MOST_PARTS)
    words = [sys.executable, "-W", "ignore", "-m", "examples.answers", *map(str, (base, adapter, held_out))]
    return Asking([[*words, f"{part}/{parts}"] for part in range(parts)], threads=max(1, cores // parts))


class Part:
    """One process and what it has printed."""

    def __init__(self, command: Sequence[str], *, threads: int) -> None:
        # Threads that spin long for each other (libgomp's default) hardly get on where anything else runs.
        settings = {"GOMP_SPINCOUNT": "10000", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = {**os.environ, **settings, "OMP_NUM_THREADS": str(threads)}
        self.share = 0.0
        self._last: dict[str, Any] = {}
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for text in self._process.stdout or ():
            self._last = json.loads(text)
            self.share = self._last.get("share", self.share)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def reads(self) -> bool:
        """Whether there may be more; waits a moment for it."""
        self._reader.join(LOOK_SECONDS)
        return self._reader.is_alive()

    def complain(self) -> None:
        """Raises StackFailed if the process has failed."""
        if self._process.poll():
            self._errors.seek(0)
            raise StackFailed(f"The answers did not come:\n{self._errors.read()[-2000:]}")

    def rows(self) -> list[dict[str, str]]:
        """Its rows, once it has ended. Raises StackFailed."""
        self._process.wait()
        self.complain()
        rows: list[dict[str, str]] = self._last["rows"]
        return rows

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.running:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
