"""Rings workers for the API: after the answer, and once for all requests that came meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from shared.store.lifecycle import Lane

PAUSE_SECONDS: Final = 0.05  # between rings: a burst of submissions needs no ring each, and one costs 3 ms


class RingThread:
    """One thread that rings. A lane asked for while it is busy is rung again, so no commit goes unrung.

    Rings may be lost by design, so nothing waits for one: not a request, not the process's end.
    """

    def __init__(self, ring: Callable[[Lane], object]) -> None:
        self._ring = ring
        self._wanted: set[Lane] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def ring(self, lane: Lane) -> None:
        """Have the lane rung soon: at once when nothing is being rung. Call it after a commit."""
        with self._changed:
            self._wanted.add(lane)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="bell", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Ring for the requests that are left, and end within a second."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing.is_set())
                lanes, self._wanted = self._wanted, set()
            for lane in sorted(lanes):
                self._ring(lane)
            if self._closing.wait(PAUSE_SECONDS) and not self._wanted:
                return
