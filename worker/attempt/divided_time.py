"""Divides the time of a device among the attempts that are on it, by the time of the steps that each has measured.

Whenever one leaves, the time since the last such moment is divided among those that were there. So the parts of all
are together the whole, whoever comes to an end first. Where nobody has measured anything the parts are equal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable


class DividedTime:
    """Of one device, from now on. Its methods may be called by several threads."""

    def __init__(self, members: Iterable[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._owed = dict.fromkeys(members, 0.0)  # seconds, by member
        self._steps = dict.fromkeys(self._owed, 0.0)  # seconds of steps since the last cut
        self._here = set(self._owed)
        self._began = self._cut_at = clock()

    def worked(self, member: str, seconds: float) -> None:
        """The member has taken a step of so many seconds."""
        with self._lock:
            self._steps[member] += max(0.0, seconds)

    def leave(self, member: str) -> float:
        """The member has the device no more. Returns which part of the time since the beginning was its own."""
        with self._lock:
            if member in self._here:
                self._cut()
                self._here.discard(member)
            passed = self._clock() - self._began
            return min(1.0, self._owed[member] / passed) if passed > 0 else 1 / len(self._owed)

    def _cut(self) -> None:
        now = self._clock()
        measured = sum(self._steps[member] for member in self._here)
        for member in self._here:
            part = self._steps[member] / measured if measured > 0 else 1 / len(self._here)
            self._owed[member] += (now - self._cut_at) * part
        self._steps = dict.fromkeys(self._steps, 0.0)
        self._cut_at = now
