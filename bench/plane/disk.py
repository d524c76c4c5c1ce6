"""How long the disk takes for one small commit while something else is measured: is a slow answer the disk's?

Every commit of Postgres waits for the disk. A process of its own appends 8 KiB to a file beside the database's and asks
for fdatasync, fifty times a second, and writes down when each began and ended. Where the process itself wakes late, the
processor was somebody else's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

PAUSE: Final = 0.02
PAGE: Final = bytes(8192)

Span = tuple[float, float]  # begin and end, as CLOCK_MONOTONIC has them: one clock for all processes of a machine


class Disk:
    """The commits that the probe made; empty until the block of `watched` is left."""

    def __init__(self) -> None:
        self.commits: list[Span] = []
        self.late: list[Span] = []  # from when the probe should have woken to when it did

    def quantile(self, share: float) -> float:
        """Nearest rank, in seconds; 0 if none was made."""
        ordered = sorted(end - begin for begin, end in self.commits)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def beside(answers: list[Span], spans: list[Span], *, slow: float) -> float:
    """The share of the answers during which one of the spans went on that took `slow` seconds or longer."""
    stalls = [(begin, end) for begin, end in spans if end - begin >= slow]
    struck = [any(begin < last and first < end for first, last in stalls) for begin, end in answers]
    return sum(struck) / len(struck) if struck else 0.0


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Disk]:
    """Commits to a file in the folder as long as the block lasts."""
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_commit, args=(folder, its), daemon=True)
    process.start()
    its.close()
    ours.recv()  # it commits now: its start is not part of the measuring
    disk = Disk()
    try:
        yield disk
    finally:
        ours.send(None)
        disk.commits, disk.late = ours.recv()
        process.join()


def _commit(folder: Path, line: Connection) -> None:
    path, commits, late = folder / "disk-probe", list[Span](), list[Span]()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    line.send(None)
    due = time.monotonic() + PAUSE
    while not line.poll(max(0.0, due - time.monotonic())):
        begin = time.monotonic()
        late.append((due, begin))
        os.write(descriptor, PAGE)
        os.fdatasync(descriptor)
        commits.append((begin, time.monotonic()))
        due = time.monotonic() + PAUSE
    os.close(descriptor)
    path.unlink()
    line.send((commits, late))
