"""Programs that the CPU lane starts: isolated like trainers, watched to their end, their lease kept meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import structlog

from shared.contract.events import EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.contract.handover import Handover
from shared.contract.spec import Placement
from shared.errors import TunepoolError
from shared.lease import lease as leasing
from shared.lease.lease import Kind
from shared.lease.values import Lease
from worker.host.devices import host_memory
from worker.host.host import AWAY, Host
from worker.program import launcher, processes, workdir
from worker.program.launcher import Exit, Trainer
from worker.program.memory_wall import Allowance, MemoryWall
from worker.program.processes import Tag
from worker.program.spare import Spare, handed_over
from worker.program.trainer_events import EventTail
from worker.program.workdir import Workdir

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.1
# On a host that is short of memory, a program of the CPU lane may hold this part of it. Most bound themselves below.
SHARES: Final = 4


class Stopped(Exception):
    """The work is over before it is done: fenced off, or the worker is shutting down."""


class TooSlow(TunepoolError):
    """A program did not end in its time, and was ended."""

    code = "program_timeout"


class Checked(Protocol):
    """What is asked again and again while something long goes on."""

    def check(self) -> None:
        """Raises Stopped when there is no more use in it."""


class LeaseWatch:
    """Keeps a lease while something long goes on, and ends that when there is no more use in it."""

    def __init__(self, host: Host, kind: Kind, lease: Lease, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._kind, self._lease, self._clock = host, kind, lease, clock
        self._kept = clock()

    def check(self) -> None:
        """Extend the lease when it is time. Raises Stopped when it is lost or the worker drains."""
        if self._host.flags.draining:
            raise Stopped
        settings = self._host.settings
        if self._clock() - self._kept < settings.heartbeat_seconds:
            return
        self._kept = self._clock()
        try:
            kept = self._host.write(
                lambda s: leasing.keep(s, self._kind, self._lease, lease_seconds=settings.lease_seconds)
            )
        except AWAY as error:
            # Another worker may take the row when the lease is over; the fence keeps what both write apart.
            log.warning("lease.unheard", kind=self._kind.name, id=self._lease.id, error=str(error)[:200])
            return
        if not kept:
            raise Stopped


def under_lease(host: Host, kind: Kind, lease: Lease, work: Callable[[LeaseWatch], None]) -> bool:
    """Do `work` and write what came of it. False: it was stopped, and the row is free again at no cost.

    The row is given back when the worker drains, when the lease is lost (nothing is written then), and when Postgres
    is away for too long. The folder of this lease goes away, and no other: a later holder may work beside it.
    """
    try:
        with structlog.contextvars.bound_contextvars(chore=kind.name, chore_id=lease.id):
            work(LeaseWatch(host, kind, lease))
    except (Stopped, *AWAY) as error:
        log.info("chore.stopped", kind=kind.name, id=lease.id, reason=type(error).__name__)
        host.write_in_the_end(lambda s: leasing.give_back(s, kind, lease, counted=False))
        return False
    finally:
        workdir.remove(host.work, lease)
    return True


def run(
    host: Host,
    module: str,
    *,
    lease: Lease,
    place: Workdir,
    watch: Checked,
    seconds: float | None = None,
    threads: int = 1,
    environment: Callable[[Tag, Path], dict[str, str]] | None = None,
    reads: tuple[Path, ...] = (),
    ahead: Spare | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Exit:
    """Run `python -m module place.spec place.out` to its end, for `seconds` at most. Nothing of it lives afterwards.

    `environment` makes its variables of tag and OUT; left out, it works on `threads` of the processor. `reads`: what it
    may read beside its own folder. `ahead`: a spare of the module in this folder, which is the program if it takes the
    work.

    Raises Stopped, TooSlow, StillAlive.
    """
    work = Handover(spec=str(place.spec), out=str(place.out))
    program = handed_over(ahead, work, interrupt=watch.check) or _started(
        host,
        module,
        lease=lease,
        place=place,
        seconds=seconds,
        environment=environment or partial(_on_the_processor, threads),
        reads=reads,
    )
    began, total = clock(), host_memory()[0]
    wall = MemoryWall(Allowance(share=total // SHARES), memory=host_memory)
    try:
        while program.poll() is None:
            watch.check()
            if (held := wall.exceeded()) is not None:
                return wall.end(program, held)[0]
            if seconds is not None and clock() - began > seconds:
                raise TooSlow(f"The program took more than {seconds:g} seconds.")
            time.sleep(LOOK_SECONDS)
    finally:
        ended = program.end(grace_seconds=0)
    return ended


def _on_the_processor(threads: int, tag: Tag, out: Path) -> dict[str, str]:
    return launcher.environment(tag=tag, device_ids=(), kind="cpu", threads=threads, scratch=out)


def _started(
    host: Host,
    module: str,
    *,
    lease: Lease,
    place: Workdir,
    seconds: float | None,
    environment: Callable[[Tag, Path], dict[str, str]],
    reads: tuple[Path, ...],
) -> Trainer:
    tag = processes.own_tag(home=host.settings.home.resolve(), job_id=lease.id, fence=lease.fence)
    return launcher.start(
        launcher.command(module, placement=Placement(), spec_file=place.spec, out=place.out),
        environment=environment(tag, place.out),
        tag=tag,
        out=place.out,
        log_file=place.log,
        uid=host.trainer_uid,
        # The last word, should nobody here look at the clock.
        cpu_seconds=None if seconds is None else seconds * launcher.CORES,
        isolation=host.isolation,
        reads=(place.root, *reads),
        home=host.settings.home.resolve(),
    )


def users_fault(place: Workdir, ended: Exit) -> Failed | None:
    """What a program says is wrong with what it was given; None when it did not end so."""
    if ended.code not in {EXIT_USER_FAULT, EXIT_OUT_OF_MEMORY}:
        return None
    failed = [event for event in EventTail(place.events).read() if isinstance(event, Failed)]
    return failed[-1] if failed else None
