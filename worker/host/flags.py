"""Flags in memory that a worker's main process shares with its children: registered, drain, pulls, who is busy.

Plain bytes in an anonymous map, made before the fork: no lock, so a child killed at any moment leaves none held.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import select
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, get_args

from shared.store.lifecycle import Lane

LANES: Final[tuple[Lane, ...]] = get_args(Lane)
_SLOTS: Final[dict[Lane, int]] = {"training": 8, "cpu": 16}
_CHILDREN: Final = 64  # the byte of the first child; each child writes its own
_AT_WORK: Final[dict[Lane, int]] = {"training": 1, "cpu": 2}
_KEEPING = 3  # inside a task of either lane, which waits with a spare for a bell
_KEPT: Final = 1024  # the byte of the first seat: whether a child waits there for its next work
_WARM: Final = 4096  # the first byte of a mark for each seat: the base model that is held in memory there
_MARK_BYTES: Final = 16
_BYTES: Final = 16384  # room for 768 seats
_MOMENT: Final = struct.Struct("d")  # one aligned 8-byte store: never torn on the machines we run on


def _mark(base_model: str) -> bytes:
    return hashlib.sha256(base_model.encode()).digest()[:_MARK_BYTES]


class SharedFlags:
    """Written and read by every process forked after it was made."""

    def __init__(self, *, devices: int = 0) -> None:
        """`devices`: how many of them may have a child that waits with a spare (worker/attempt/seat.py).

        Where there is one, evaluations have a seat as well (worker/chores/evaluation_seat.py).
        """
        self._bytes = mmap.mmap(-1, _BYTES)
        seats = devices + 1 if devices else 0
        self._bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(seats)]

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

    # --- children that wait with a spare ------------------------------------------------------------------------------

    @property
    def seats(self) -> range:
        """Numbers of the devices that a child may wait for; none in a process that shares no flags."""
        return range(len(self._bells) - 1)

    @property
    def evaluations(self) -> int | None:
        """Number of the seat at which a child may wait for evaluations; None in a process that shares no flags."""
        return len(self._bells) - 1 if self._bells else None

    @property
    def kept(self) -> frozenset[int]:
        """Numbers of the devices whose next job is a sitting child's."""
        return frozenset(filter(self.is_kept, self.seats))

    def is_kept(self, number: int | None) -> bool:
        """Whether a child sits at this seat."""
        return number is not None and self._bytes[_KEPT + number] != 0

    def sit(self, number: int) -> None:
        """The next work of seat `number` is for who sits there."""
        self._bytes[_KEPT + number] = 1

    def rise(self, number: int) -> None:
        """Nobody sits at seat `number`: who did is at work, has left, or was killed."""
        self._bytes[_KEPT + number] = 0
        self.cool(number)

    def warm(self, number: int, base_model: str) -> None:
        """Who waits for the next job of device `number` holds this base model in memory."""
        start = _WARM + number * _MARK_BYTES
        self._bytes[start : start + _MARK_BYTES] = _mark(base_model)

    def cool(self, number: int) -> None:
        """Nobody holds one there any more."""
        start = _WARM + number * _MARK_BYTES
        self._bytes[start : start + _MARK_BYTES] = bytes(_MARK_BYTES)

    def warm_base(self, number: int, among: Iterable[str]) -> str | None:
        """Which of these base models is held for device `number`; half a mark is none."""
        start = _WARM + number * _MARK_BYTES
        mark = self._bytes[start : start + _MARK_BYTES] if number in self.seats else b""
        return next((name for name in among if _mark(name) == mark), None)

    @contextmanager
    def idle_at_seat(self, lane: Lane, *, child: int) -> Iterator[None]:
        """Child number `child` is inside a task of the lane, and waits."""
        self._bytes[_CHILDREN + child] = _KEEPING
        try:
            yield
        finally:
            self._bytes[_CHILDREN + child] = _AT_WORK[lane]

    def ring_seats(self, lane: Lane | None = None) -> None:
        """Wake whoever sits for a lane, or for any, and have the others look once before they do.

        Safe in a signal handler.
        """
        bells = {None: self._bells, "training": self._bells[:-1], "cpu": self._bells[-1:]}[lane]
        for bell in bells:
            with contextlib.suppress(BlockingIOError):  # it has rung often enough
                os.eventfd_write(bell, 1)

    def hears(self, number: int, *, seconds: float) -> bool:
        """Whether the bell of seat `number` rings within so long, or has rung since it was last heard."""
        bell = self._bells[number]
        waiting = select.poll()
        waiting.register(bell, select.POLLIN)
        if not waiting.poll(seconds * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(bell)
        return True

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
