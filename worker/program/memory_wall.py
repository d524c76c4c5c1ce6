"""Bounds the memory of the host that a program and its children hold. It looks from outside, once a second.

A trainer bounds itself, and then says that its memory is used up (worker/train/memory.py). One that was taken over
does not, or forks others that each hold as much. The kernel has no limit for that without a cgroup of our own, which
few hosts give us: RLIMIT_AS would also count what is only mapped, such as the base model and the libraries of CUDA.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from shared.contract.events import EXIT_OUT_OF_MEMORY, Failed
from worker.program.launcher import Exit, Watched

LOOK_SECONDS: Final = 1.0
# A trainer that bounds itself holds this much beside what it counts: launcher, compilers, pages that others share.
SLACK_BYTES: Final = 512 * 1024**2
SLACK: Final = 1.1
# A host with less than this part of its memory left has programs end that hold more than their share of it.
SHORT: Final = 0.05
# Memory of a process that no file stands for, resident or swapped out (proc_pid_status(5)).
_OWN: Final = ("RssAnon:", "RssShmem:", "VmSwap:")
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Allowance:
    """Bytes of the host that a program may hold.

    Args:
        most: never more; None where only the host's shortness bounds it.
        share: more than this only while the host is not short of memory.
    """

    share: int
    most: int | None = None

    def exceeded(self, held: int, *, total: int, available: int) -> bool:
        """Whether a program that holds `held` must end, on a host of `total` bytes with `available` left. Pure."""
        if self.most is not None and held > self.most * SLACK + SLACK_BYTES:
            return True
        return available < SHORT * total and held > self.share


class MemoryWall:
    """Looks after one program, which is the only one that this process has started."""

    def __init__(
        self,
        allowance: Allowance,
        *,
        memory: Callable[[], tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` tells (total, available) bytes of the host."""
        self._allowance, self._memory, self._clock = allowance, memory, clock
        self._looked = clock()

    def exceeded(self) -> int | None:
        """The bytes that the program holds, if they are too many; else None. Looks once a second at most."""
        if self._clock() - self._looked < LOOK_SECONDS:
            return None
        held = held_bytes()
        self._looked = self._clock()
        total, available = self._memory()
        return held if self._allowance.exceeded(held, total=total, available=available) else None

    def end(self, trainer: Watched, held: int) -> tuple[Exit, Failed]:
        """End a trainer that holds too much; it has ended, and failed, as one that has seen so itself."""
        ended = trainer.end(grace_seconds=0)
        message = f"The trainer held {held / 2**30:.1f} GiB of its host's memory, which is more than it may."
        failed = Failed(time=0.0, code="host_oom", message=message, peak_memory_bytes=held)
        return Exit(EXIT_OUT_OF_MEMORY, ended.last_words), failed


def held_bytes() -> int:
    """Bytes of their own that all descendants of this process hold together. What several share counts for each."""
    return sum(_own_bytes(process.pid) for process in psutil.Process().children(recursive=True))


def _own_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        lines = (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN))  # kB are KiB there
    return 0
