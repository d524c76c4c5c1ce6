"""Starting and ending a child process, so that none outlives us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Final

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A preexec function: the kernel sends `number` to the child when the thread that started it ends."""
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended between fork and prctl
            os._exit(1)

    return prepare


def stop_child(process: subprocess.Popen[bytes], number: signal.Signals, *, seconds: float) -> int:
    """Ask a child to end; kill its whole session when it has not after `seconds`. Returns its exit code."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
