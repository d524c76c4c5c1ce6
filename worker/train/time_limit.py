"""A bound on the time that strangers' templates may take."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

AGAIN_SECONDS: Final = 0.2


class TimeIsUp(BaseException):
    """Raised inside `time_limit`. No Exception: jinja catches those at many places, and would go on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the body after `seconds` of wall clock, and again and again until the body ends.

    Main thread only; not to be nested.
    """
    inside = True

    def ring(_number: int, _frame: FrameType | None) -> None:
        if inside:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        try:
            yield
        finally:
            inside = False
    finally:  # also when it has rung before the line above
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
