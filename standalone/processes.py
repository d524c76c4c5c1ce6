"""Starts children in order, restarts those that die, and ends all of them: no child outlives this process."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Final

import structlog

from standalone.children import Child, ChildFailed, end, spawn, wait_until_ready

log = structlog.get_logger()

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 60.0  # a child that ran so long starts with the first pause again
LOOK_SECONDS: Final = 0.1
NOTICE_SECONDS: Final = 0.5  # a child that takes longer to end is told of


class StopRequested(Exception):
    """The operator wants us to end; no failure."""


@dataclass
class Backoff:
    """How long to wait before a child that died is started again. Pure: the time is a parameter."""

    pause: float = FIRST_PAUSE_SECONDS

    def after(self, *, ran_seconds: float) -> float:
        """The pause in seconds after a run of so long: it doubles while the child keeps dying young."""
        if ran_seconds > STEADY_SECONDS:
            self.pause = FIRST_PAUSE_SECONDS
        now, self.pause = self.pause, min(self.pause * 2, LONGEST_PAUSE_SECONDS)
        return now


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    since: float
    backoff: Backoff
    again_at: float | None = None  # set while it is dead


class Stack:
    """Children in their order. `start` each, `watch` until a signal, `stop` in reverse."""

    def __init__(self) -> None:
        self._running: list[_Running] = []
        self._signals = 0

    def listen(self) -> None:
        """SIGINT, SIGTERM and SIGHUP end `start` and `watch`; a second one hastens `stop`."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self._ending():
            raise StopRequested

    def _ending(self) -> bool:
        return self._signals > 0

    def start(self, child: Child) -> None:
        """Start a child and wait until it is ready. Raises ChildFailed, Stopped; the child is ours to stop then."""
        for left in range(child.tries - 1, -1, -1):
            self.check()
            running = _Running(child, spawn(child), since=time.monotonic(), backoff=Backoff())
            self._running.append(running)
            try:
                wait_until_ready(child, running.process, given_up=self._ending)
                break
            except ChildFailed:
                if not left:
                    raise
                end(child, self._running.pop().process)
        self.check()

    def watch(self) -> None:
        """Until a signal comes, restart children that died, ever more slowly while they keep dying."""
        while not self._ending():
            for running in self._running:
                self._look_after(running, time.monotonic())
            time.sleep(LOOK_SECONDS)

    def _look_after(self, running: _Running, now: float) -> None:
        code = running.process.poll()
        if code is None:
            return
        if running.again_at is None:
            self._plan_restart(running, now, reason=f"exit code {code}")
        elif now >= running.again_at:
            self._restart(running, now)

    def _plan_restart(self, running: _Running, now: float, *, reason: str) -> None:
        pause = running.backoff.after(ran_seconds=now - running.since)
        running.again_at = now + pause
        log.warning("child.died", name=running.child.name, reason=reason, again_in_seconds=pause)

    def _restart(self, running: _Running, now: float) -> None:
        running.since = now
        try:
            running.process = spawn(running.child)
        except ChildFailed as error:
            self._plan_restart(running, now, reason=str(error))
        else:
            running.again_at = None
            log.info("child.restarted", name=running.child.name, pid=running.process.pid)

    def stop(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """End every child, the last one first: politely, then by force with all it has started.

        `tell`: is given a sentence for each child that takes its time.
        """
        for running in reversed(self._running):
            end(running.child, running.process, hurried=self._hurried(running.child, tell))
        self._running.clear()

    def _hurried(self, child: Child, tell: Callable[[str], None]) -> Callable[[], bool]:
        """Whether a second signal has come; asked again and again while a child ends."""
        notice_at: float | None = time.monotonic() + NOTICE_SECONDS

        def asked() -> bool:
            nonlocal notice_at
            if notice_at is not None and time.monotonic() >= notice_at:
                notice_at = None
                words = "" if self._signals > 1 else "; a second signal ends it now"
                tell(f"waits for the {child.name}, {child.stop_seconds:.0f} s at the most{words}")
            return self._signals > 1

        return asked
