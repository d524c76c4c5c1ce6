"""A wall clock that is wrong by `CLOCK_AHEAD_SECONDS`, for the processes that have this folder on their PYTHONPATH.

Python imports a module of this name before any other, so whoever takes these by name takes the wrong ones. What was
forked since then (tests/forked.py) has an environment of its own, and so a clock of its own.
"""

from __future__ import annotations

import datetime
import os
import time

_time, _time_ns, _Datetime = time.time, time.time_ns, datetime.datetime


def ahead() -> float:
    return float(os.environ.get("CLOCK_AHEAD_SECONDS", "0"))


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Datetime)


class _WrongDatetime(_Datetime, metaclass=_Kind):
    __slots__ = ()  # C extensions look at its size

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _WrongDatetime:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> _WrongDatetime:
        return cls.now(datetime.UTC).replace(tzinfo=None)


_WrongDatetime.__name__ = _WrongDatetime.__qualname__ = "datetime"
_WrongDatetime.__module__ = "datetime"
time.time = lambda: _time() + ahead()
time.time_ns = lambda: _time_ns() + int(ahead() * 1e9)
datetime.datetime = _WrongDatetime  # type: ignore[misc]
