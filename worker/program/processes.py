"""Which processes on this host are ours, and the proof that they are gone. Linux; no database, no queue.

Every trainer carries a tag in its environment, and so does whatever it forks. The tag names the supervisor by pid and
start time, so that a later worker can tell an orphan from a neighbour's trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import billiard
import psutil

TAG: Final = "TUNEPOOL_ATTEMPT"
DEVICES_TAG: Final = "TUNEPOOL_DEVICES"

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class StillAlive(Exception):  # a fact about processes, named as one
    """A process survived SIGKILL for longer than we wait: it hangs in the kernel and holds its device."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Whose process this is. Host-wide unique: a pid alone is reused, a pid with its start time is not."""

    home: str
    job_id: str
    fence: int
    supervisor_pid: int
    supervisor_started: float

    def __str__(self) -> str:
        return f"{self.job_id}/{self.fence}/{self.supervisor_pid}/{self.supervisor_started}/{self.home}"

    @classmethod
    def read(cls, text: str) -> Tag | None:
        """The tag spelled by `text`, or None when it is no tag of ours."""
        parts = text.split("/", 4)
        try:
            return cls(
                job_id=parts[0],
                fence=int(parts[1]),
                supervisor_pid=int(parts[2]),
                supervisor_started=float(parts[3]),
                home=parts[4],
            )
        except (IndexError, ValueError):
            return None

    def supervised(self) -> bool:
        """Whether the supervisor that started this trainer still lives."""
        try:
            supervisor = psutil.Process(self.supervisor_pid)
            same = bool(supervisor.create_time() == self.supervisor_started)
            return same and supervisor.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def own_tag(*, home: Path, job_id: str, fence: int) -> Tag:
    """The tag of a trainer that this very process starts."""
    me = psutil.Process()
    return Tag(home=str(home), job_id=job_id, fence=fence, supervisor_pid=me.pid, supervisor_started=me.create_time())


def own_signals() -> None:
    """Begin with signals as every program does, whoever starts it: none blocked, and none ignored but SIGINT.

    A program inherits what its parent ignores and blocks, which differs between the processes of a worker. SIGINT is
    for the people at a terminal, whose worker ends its programs by itself.
    """
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) in {signal.SIG_IGN, signal.SIG_DFL}:  # handlers end with the exec
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; at once if the parent `parent` is gone already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def give_up_first(pid: int) -> None:
    """Have the kernel, when memory runs out, end this process and what it forks before anybody else (proc(5))."""
    with contextlib.suppress(OSError):  # it has ended already, or the kernel has no such file
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")


def adopt_strays() -> None:
    """Become the parent of whatever a trainer forks and abandons, so that `kill_strays` can find it without its tag."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tagged() -> Iterator[tuple[psutil.Process, Tag, frozenset[str]]]:
    """Every living process with a tag of ours: (process, tag, ids of the devices it was given)."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            environment = process.environ()
            tag = Tag.read(environment.get(TAG, ""))
            if tag is not None and _alive(process):
                yield process, tag, frozenset(environment.get(DEVICES_TAG, "").split(","))


def kill_orphans(*, home: Path) -> list[int]:
    """Kill trainers of this home whose supervisor is dead. Returns their pids. Raises StillAlive."""
    return kill([process for process, tag, _ in tagged() if tag.home == str(home) and not tag.supervised()])


def kill_squatters(device_ids: tuple[str, ...], *, mine: Tag) -> list[int]:
    """Kill trainers on devices that this attempt has leased: whoever is there lost its lease. Raises StillAlive."""
    wanted = frozenset(device_ids)
    return kill(
        [process for process, tag, devices in tagged() if tag != mine and tag.home == mine.home and wanted & devices]
    )


def kill_strays(tag: Tag, *, spared: frozenset[psutil.Process] | None = frozenset()) -> list[int]:
    """Kill all that an attempt has left behind: by tag, and by descent from this process. Raises StillAlive.

    `spared`: the descendants that were there before it began. None: whatever has no tag is spared, because this process
    starts others meanwhile.
    """
    by_tag = [process for process, its_tag, _ in tagged() if its_tag == tag]
    return kill([*by_tag, *(() if spared is None else descendants(tag) - spared)])


def descendants(tag: Tag) -> frozenset[psutil.Process]:
    """Living descendants of the tag's supervisor, which must be this process."""
    assert tag.supervisor_pid == os.getpid()
    return frozenset(process for process in psutil.Process().children(recursive=True) if _alive(process))


def kill(
    processes: list[psutil.Process], *, patience_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> list[int]:
    """SIGKILL each process and wait until the last is gone. Raises StillAlive naming those that stay."""
    deadline = clock() + patience_seconds
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    while left := [process for process in processes if _alive(process)]:
        if clock() > deadline:
            raise StillAlive(f"Processes {[process.pid for process in left]} survive SIGKILL.")
        time.sleep(0.02)
    return [process.pid for process in processes]


def _alive(process: psutil.Process) -> bool:
    _reap(process.pid)
    try:
        if process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return True
    except psutil.NoSuchProcess:
        return False
    _reap(process.pid)  # it may have died between the two looks
    return False


def _reap(pid: int) -> None:
    # An adopted stray is our child: unless we wait for it, it stays a zombie. Trainers themselves belong to Popen,
    # which copes with somebody else having waited, but would lose the exit code; so only strays come here.
    with contextlib.suppress(ChildProcessError):
        if pid not in _OWN_CHILDREN:
            os.waitpid(pid, os.WNOHANG)


_OWN_CHILDREN: set[int] = set()


@contextlib.contextmanager
def owned(pid: int) -> Iterator[None]:
    """While inside, the exit code of child `pid` is left to its owner."""
    _OWN_CHILDREN.add(pid)
    try:
        yield
    finally:
        _OWN_CHILDREN.discard(pid)


def boot_id() -> str:
    """Changes with every start of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def child_number() -> int:
    """Which of Celery's children this process is, from 0; a child that replaces another has its number."""
    return getattr(billiard.current_process(), "index", None) or 0
