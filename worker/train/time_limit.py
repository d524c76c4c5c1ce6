"""A bound on the time that strangers' templates may take."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Final, Self

AGAIN_SECONDS: Final = 0.2


class TimeIsUp(BaseException):
    """Raised inside a time limit. No Exception: jinja catches those at many places, and would go on."""


class TimeLimit:
    """Raises TimeIsUp in the body of a `with` after so many seconds, and again and again until the body ends.

    A class, not a generator: an alarm that rings while the generator is being left would leave it armed for ever.
    Main thread only; not to be nested.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._inside = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._ring)
        self._inside = True
        signal.setitimer(signal.ITIMER_REAL, self._seconds, AGAIN_SECONDS)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _ring(self, _number: int, frame: FrameType | None) -> None:
        if self._inside and not _leaves(frame):
            raise TimeIsUp


def _leaves(frame: FrameType | None) -> bool:
    """Whether a `with` is just being entered or left. Cut short there, nothing would ever disarm the alarm.

    contextlib's part is the end of a generator that holds a time limit itself.
    """
    if frame is None:
        return False
    own = frame.f_code in (TimeLimit.__enter__.__code__, TimeLimit.__exit__.__code__)
    return own or frame.f_globals.get("__name__") == "contextlib"


def time_limit(seconds: float) -> TimeLimit:
    """A bound of `seconds` of wall clock on the body of a `with`."""
    return TimeLimit(seconds)
