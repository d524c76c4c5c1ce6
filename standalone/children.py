"""Starts one child process so that it cannot outlive us, waits for it, and ends it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
LOG_BYTES: Final = 10 * 1024 * 1024
HURRIED_SECONDS: Final = 1.0  # what is left to a child once the operator has asked twice


class ChildFailed(RuntimeError):
    """A child did not start; the message holds the end of its log."""


def _nothing() -> None:
    pass


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to start.

    Args:
        log: where its output is appended.
        cwd: never the operator's: a folder `api/` or `shared/` there would be imported in place of ours.
        environment: None hands ours on.
        user: options of subprocess that say whom it runs as; empty: us.
        before: runs before each start. May raise ChildFailed.
        ready: whether it does its work by now.
        tries: how many starts to grant before giving up.
        last_word: what the kernel sends it when we are gone.
    """

    name: str
    argv: Sequence[str | Path]
    log: Path
    cwd: Path
    environment: Mapping[str, str] | None = None
    user: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], None] = _nothing
    ready: Callable[[], bool] = _always
    ready_seconds: float = 60.0
    tries: int = 1
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    last_word: signal.Signals = signal.SIGTERM


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A preexec function: the kernel sends `number` to the child when the thread that started it ends."""
    parent = os.getpid()
    # Linux alone has this; elsewhere a killed parent leaves its children, and the next start finds them.
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended between fork and prctl
            os._exit(1)

    return prepare


def spawn(child: Child) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own. Raises ChildFailed when it cannot even be started."""
    child.before()
    if child.log.exists() and child.log.stat().st_size > LOG_BYTES:
        child.log.replace(child.log.with_suffix(".log.1"))
    try:
        with child.log.open("ab") as output:
            return subprocess.Popen(
                child.argv,
                cwd=child.cwd,
                env=child.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(child.last_word),
                **child.user,
            )
    except OSError as error:
        raise ChildFailed(f"{child.name} cannot be started: {error}") from error


def wait_until_ready(child: Child, process: subprocess.Popen[bytes], *, given_up: Callable[[], bool] = _never) -> None:
    """Return once the child is ready, or `given_up` says so. Raises ChildFailed with the end of its log."""
    deadline = time.monotonic() + child.ready_seconds
    while not given_up():
        ready = child.ready()
        # In this order: a port or socket that answers while our child is dead belongs to somebody else.
        if process.poll() is not None or time.monotonic() > deadline:
            raise ChildFailed(f"{child.name} did not start. The end of {child.log}:\n{log_tail(child.log)}")
        if ready:
            return
        time.sleep(0.02)


def start(child: Child) -> subprocess.Popen[bytes]:
    """Start a child and wait until it is ready. Raises ChildFailed; nothing is left running then."""
    for last in [False] * (child.tries - 1) + [True]:
        process = spawn(child)
        try:
            wait_until_ready(child, process)
        except ChildFailed:
            end(child, process)
            if last:
                raise
        else:
            break
    return process


def end(child: Child, process: subprocess.Popen[bytes], *, hurried: Callable[[], bool] = _never) -> None:
    """End a child: politely, then by force with all that stayed in its session. Waits until it is gone."""
    if process.poll() is None:
        process.send_signal(child.stop_signal)
    deadline = time.monotonic() + child.stop_seconds
    while process.poll() is None and time.monotonic() < deadline:
        if hurried():
            deadline = min(deadline, time.monotonic() + HURRIED_SECONDS)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(log: Path) -> str:
    """The last 2,000 characters, or what there is."""
    return log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
