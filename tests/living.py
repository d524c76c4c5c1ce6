"""Processes as a test looks at them: any of them may end between two looks, and then it is no longer there.

psutil raises when a process vanishes between the listing and the question. What is here answers instead: it is gone,
it has no child, its command line is empty. No other file of the tests asks psutil such a thing (tests/unit/
test_patience.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import psutil

from tests.patience import patience

TAG: Final = "TUNEPOOL_ATTEMPT"
Answer = TypeVar("Answer")


def is_alive(process: psutil.Process | int | None) -> bool:
    """Whether it runs, or could: neither gone nor a zombie. A number is a pid."""
    if process is None:
        return False
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False


def is_stopped(process: psutil.Process) -> bool:
    """Whether a signal has stopped it."""
    return _asked(lambda: process.status() == psutil.STATUS_STOPPED, otherwise=False)


def words(process: psutil.Process) -> list[str]:
    """Its command line."""
    return _asked(process.cmdline, otherwise=[])


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment that it was started with."""
    return _asked(process.environ, otherwise={})


def name(process: psutil.Process) -> str:
    return _asked(process.name, otherwise="")


def users(process: psutil.Process | None) -> set[int]:
    """The numbers of the users that it runs as: real, effective and saved."""
    return set() if process is None else _asked(lambda: set(process.uids()), otherwise=set())


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Addresses of the network at which it takes connections."""
    connections = _asked(lambda: process.net_connections("inet"), otherwise=[])
    return [tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN]


def parent(process: psutil.Process) -> psutil.Process | None:
    return _asked(process.parent, otherwise=None)


def children(process: psutil.Process | int) -> list[psutil.Process]:
    """What it has started itself, and lives."""
    return _living(process, recursive=False)


def family(process: psutil.Process | int) -> list[psutil.Process]:
    """What descends from it, and lives, however far down and in whatever session."""
    return _living(process, recursive=True)


def tagged(mark: str) -> list[psutil.Process]:
    """Living processes of this machine with `mark` in the tag of their attempt."""
    return [process for process in psutil.process_iter() if mark in tag(process) and is_alive(process)]


def tag(process: psutil.Process) -> str:
    """To which attempt it belongs; empty for what is none of ours."""
    return environment(process).get(TAG, "")


def await_end(processes: Iterable[psutil.Process], *, seconds: float = 15.0) -> list[psutil.Process]:
    """Those that still live when the wait is over; `seconds` are those of a fast machine."""
    watched = list(processes)
    deadline = time.monotonic() + patience(seconds)
    while (left := [process for process in watched if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.03)
    return left


def _living(process: psutil.Process | int, *, recursive: bool) -> list[psutil.Process]:
    pid = process if isinstance(process, int) else process.pid
    listed = _asked(lambda: psutil.Process(pid).children(recursive=recursive), otherwise=[])
    return [child for child in listed if is_alive(child)]


def _asked(ask: Callable[[], Answer], *, otherwise: Answer) -> Answer:
    try:
        return ask()
    except (psutil.Error, OSError):
        return otherwise


def open_files(pid: int) -> list[str]:
    """Where its descriptors lead, in the kernel's words; those that it closes meanwhile are left out."""
    folder = f"/proc/{pid}/fd"
    leads: list[str] = []
    for name in _asked(lambda: os.listdir(folder), otherwise=[]):
        try:
            leads.append(os.readlink(f"{folder}/{name}"))
        except OSError:
            continue
    return leads
