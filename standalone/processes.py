"""Runs children in order, restarts what dies, and ends all of them: no child outlives this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

import structlog

from standalone.children import die_with_parent

log = structlog.get_logger()

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 60.0  # a child that ran so long starts with the first pause again
LOOK_SECONDS: Final = 0.1
LOG_BYTES: Final = 10 * 1024 * 1024


@dataclass(frozen=True)
class Child:
    """A process to keep alive."""

    name: str
    argv: Sequence[str]
    environment: dict[str, str]
    ready: Callable[[], bool] = lambda: True
    ready_seconds: float = 60.0
    stop_seconds: float = 10.0
    once: bool = False  # runs to its end, is not started again


class ChildFailed(RuntimeError):
    """A child did not become ready."""


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    since: float
    pause: float = FIRST_PAUSE_SECONDS
    again_at: float = field(default=0.0)


class Stack:
    """Children in their order. `start` each, `watch` until a signal, `stop` in reverse."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[_Running] = []
        self._signals = 0

    def listen(self) -> None:
        """SIGINT and SIGTERM end `watch`; a second one hastens `stop`."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    @property
    def ending(self) -> bool:
        return self._signals > 0

    def start(self, child: Child) -> None:
        """Start a child and wait until it is ready. Raises ChildFailed with the end of its log."""
        process = self._spawn(child)
        self._running.append(_Running(child, process, since=time.monotonic()))
        deadline = time.monotonic() + child.ready_seconds
        while not child.ready():
            if self.ending:
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(f"{child.name} did not start. The end of {self._log(child)}:\n{self._tail(child)}")
            time.sleep(0.05)

    def watch(self) -> None:
        """Until a signal comes: start again what has died, ever more slowly while it keeps dying."""
        while not self.ending:
            now = time.monotonic()
            for running in self._running:
                self._look_after(running, now)
            time.sleep(LOOK_SECONDS)

    def _look_after(self, running: _Running, now: float) -> None:
        code = running.process.poll()
        if code is None or running.child.once:
            return
        if not running.again_at:
            steady = now - running.since > STEADY_SECONDS
            running.pause = FIRST_PAUSE_SECONDS if steady else running.pause
            running.again_at = now + running.pause
            log.warning("child.died", name=running.child.name, code=code, again_in_seconds=running.pause)
            running.pause = min(running.pause * 2, LONGEST_PAUSE_SECONDS)
        elif now >= running.again_at:
            running.process, running.since, running.again_at = self._spawn(running.child), now, 0.0

    def stop(self) -> None:
        """End every child, the last one first: politely, then by force with all it has started."""
        for running in reversed(self._running):
            self._end(running)
        self._running.clear()

    def _end(self, running: _Running) -> None:
        process = running.process
        if process.poll() is None:
            process.terminate()
        deadline = time.monotonic() + running.child.stop_seconds
        while process.poll() is None and time.monotonic() < deadline and self._signals < 2:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        file = self._log(child)
        if file.exists() and file.stat().st_size > LOG_BYTES:
            file.replace(file.with_suffix(".log.1"))
        with file.open("ab") as output:
            return subprocess.Popen(
                child.argv,
                env=child.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def _log(self, child: Child) -> Path:
        return self._logs / f"{child.name}.log"

    def _tail(self, child: Child) -> str:
        return self._log(child).read_text(encoding="utf-8", errors="replace")[-2000:]
