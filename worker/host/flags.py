"""Flags in memory that a worker's main process shares with its children: registered, drain, pulls, who is busy.

Plain bytes in an anonymous map, made before the fork: no lock, so a child killed at any moment leaves none held.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, get_args

from shared.store.lifecycle import Lane

LANES: Final[tuple[Lane, ...]] = get_args(Lane)
_SLOTS: Final[dict[Lane, int]] = {"training": 8, "cpu": 16}
_CHILDREN: Final = 64  # the byte of the first child; each child writes its own
_AT_WORK: Final[dict[Lane, int]] = {"training": 1, "cpu": 2}
_MOMENT: Final = struct.Struct("d")  # one aligned 8-byte store: never torn on the machines we run on


class SharedFlags:
    """Written and read by every process forked after it was made."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def registered(self) -> bool:
        """True once this worker may take work: registering ends every lease of its earlier life."""
        return self._bytes[2] != 0

    def register(self) -> None:
        """For good."""
        self._bytes[2] = 1

    @property
    def draining(self) -> bool:
        """True while this worker takes no more work and its attempts checkpoint and stop."""
        return self._bytes[0:2] != b"\0\0"

    @property
    def leaving(self) -> bool:
        """True once this worker shuts down, and nobody can undrain it."""
        return self._bytes[0] != 0

    def drain(self) -> None:
        """For good: this worker shuts down. Safe in a signal handler."""
        self._bytes[0] = 1

    def follow(self, *, drained: bool) -> bool:
        """Take over what an administrator has ordered of this worker. True when it has changed."""
        before, self._bytes[1] = self._bytes[1], int(drained)
        return before != self._bytes[1]

    def pulled(self, lane: Lane, *, at: float) -> None:
        """Note a pull; `at` is the host's monotonic clock, one for all processes."""
        self._bytes[_SLOTS[lane] : _SLOTS[lane] + 8] = _MOMENT.pack(at)

    def last_pull(self, lane: Lane) -> float:
        moment: float = _MOMENT.unpack(self._bytes[_SLOTS[lane] : _SLOTS[lane] + 8])[0]
        return moment

    # --- children at work -------------------------------------------------------------------------------------------

    @contextmanager
    def at_work(self, lane: Lane, *, child: int) -> Iterator[None]:
        """Child number `child` (from 0) is inside a task of the lane."""
        self._bytes[_CHILDREN + child] = _AT_WORK[lane]
        try:
            yield
        finally:
            self.begin(child=child)

    def begin(self, *, child: int) -> None:
        """Child number `child` is idle: it has just started, in the place of one that may have been killed at work."""
        self._bytes[_CHILDREN + child] = 0

    def has_idle_child(self, children: int) -> bool:
        """Whether one of the first `children` could take a task now."""
        return 0 in self._bytes[_CHILDREN : _CHILDREN + children]

    @property
    def training(self) -> bool:
        """Whether a child is inside a task of the training lane: it may supervise an attempt."""
        return _AT_WORK["training"] in self._bytes[_CHILDREN:]
