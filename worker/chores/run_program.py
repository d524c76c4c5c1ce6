"""Programs that the CPU lane starts: isolated like trainers, watched to their end, their lease kept meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from shared.contract.events import EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.contract.spec import Placement
from shared.errors import TunepoolError
from shared.lease.values import Lease
from worker.host.host import Host
from worker.program import launcher, processes
from worker.program.launcher import Exit
from worker.program.trainer_events import EventTail
from worker.program.workdir import Workdir

LOOK_SECONDS: Final = 0.1


class Stopped(Exception):
    """The work is over before it is done: fenced off, or the worker is shutting down."""


class TooSlow(TunepoolError):
    """A program did not end in its time, and was ended."""

    code = "program_timeout"


class Watch:
    """Keeps a lease while something long goes on, and ends that when there is no more use in it.

    `keep` extends the lease and says whether it is still held.
    """

    def __init__(self, host: Host, keep: Callable[[], bool], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._keep, self._clock = host, keep, clock
        self._kept = clock()

    def check(self) -> None:
        """Raises Stopped."""
        if self._host.flags.draining:
            raise Stopped
        if self._clock() - self._kept < self._host.settings.heartbeat_seconds:
            return
        self._kept = self._clock()
        if not self._keep():
            raise Stopped


def run(
    host: Host,
    module: str,
    *,
    lease: Lease,
    place: Workdir,
    watch: Watch,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Exit:
    """Run `python -m module place.spec place.out` to its end. Raises Stopped, TooSlow; nothing of it lives then."""
    tag = processes.own_tag(home=host.settings.home.resolve(), job_id=lease.job_id, fence=lease.fence)
    program = launcher.start(
        launcher.command(module, placement=Placement(), spec_file=place.spec, out=place.out),
        environment=launcher.environment(tag=tag, device_ids=(), kind="cpu", threads=1, scratch=place.out),
        tag=tag,
        out=place.out,
        log_file=place.log,
        uid=host.trainer_uid,
        cpu_seconds=seconds * launcher.CORES,  # the last word, should nobody here look at the clock
    )
    deadline = clock() + seconds
    try:
        while program.poll() is None:
            watch.check()
            if clock() > deadline:
                raise TooSlow(f"The program took more than {seconds:g} seconds.")
            time.sleep(LOOK_SECONDS)
    finally:
        ended = program.end(grace_seconds=0)
    return ended


def users_fault(place: Workdir, ended: Exit) -> Failed | None:
    """What a program says is wrong with what it was given; None when it did not end so."""
    if ended.code not in {EXIT_USER_FAULT, EXIT_OUT_OF_MEMORY}:
        return None
    failed = [event for event in EventTail(place.events).read() if isinstance(event, Failed)]
    return failed[-1] if failed else None
