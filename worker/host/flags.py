"""Flags in memory that a worker's main process shares with its children: registered, drain, each lane's last pull.

Plain bytes in an anonymous map, made before the fork: no lock, so a child killed at any moment leaves none held.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final, get_args

from shared.store.lifecycle import Lane

LANES: Final[tuple[Lane, ...]] = get_args(Lane)
_SLOTS: Final[dict[Lane, int]] = {"training": 8, "cpu": 16}
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
        """What an administrator has ordered of this worker; True when that has changed."""
        before, self._bytes[1] = self._bytes[1], int(drained)
        return before != self._bytes[1]

    def pulled(self, lane: Lane, *, at: float) -> None:
        """Note a pull; `at` is the host's monotonic clock, one for all processes."""
        self._bytes[_SLOTS[lane] : _SLOTS[lane] + 8] = _MOMENT.pack(at)

    def last_pull(self, lane: Lane) -> float:
        moment: float = _MOMENT.unpack(self._bytes[_SLOTS[lane] : _SLOTS[lane] + 8])[0]
        return moment
