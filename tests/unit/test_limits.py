"""Time that is up is heard, whoever catches what."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from types import CodeType, SimpleNamespace
from typing import Any

import pytest

from tests.patience import patience
from worker.train.time_limit import TimeIsUp, TimeLimit, time_limit


def busy(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def deaf(*, to: type[BaseException], times: int) -> int:
    """Work that goes on although it was interrupted, as jinja's optimizer does. Returns how often it was."""
    interrupted = 0
    for _ in range(times):
        try:
            busy(60)
        except to:
            interrupted += 1
    return interrupted


def test_code_that_catches_every_exception_does_not_outlast_its_time() -> None:
    with pytest.raises(TimeIsUp), time_limit(0.2):
        deaf(to=Exception, times=10)


def test_code_that_swallows_it_is_interrupted_again_and_again() -> None:
    with time_limit(0.2):
        interrupted = deaf(to=TimeIsUp, times=3)

    assert interrupted == 3


def test_nothing_rings_after_the_end_and_what_listened_before_listens_again() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(patience(60)):
        assert signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0)

    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.parametrize(
    ("code", "module", "rings"),
    [
        (TimeLimit.__exit__.__code__, "worker.train.time_limit", False),
        (contextlib.contextmanager.__code__, "contextlib", False),
        (json.dumps.__code__, "json", True),
    ],
)
def test_an_alarm_never_cuts_the_disarming_short(code: CodeType, module: str, *, rings: bool) -> None:
    frame: Any = SimpleNamespace(f_code=code, f_globals={"__name__": module})

    with TimeLimit(60) as limit:
        if rings:
            with pytest.raises(TimeIsUp):
                limit._ring(signal.SIGALRM, frame)
        else:
            limit._ring(signal.SIGALRM, frame)

    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
