"""A seat: a child process of the worker waits there for work of one kind, with a spare of its program at hand.

A program can only be watched, and proven dead, by the process that started it. So the child that starts a spare stays
in its pull and is the one that claims the next such work; its siblings pass their bells on to it and leave that work
alone. Who has a seat is a lock of the kernel, which a killed child does not keep.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, ClassVar, Final, Protocol, TypeVar

import structlog

from shared.contract.prepared import HeldBase
from shared.fleet import workers
from shared.store.lifecycle import Lane
from worker.host.devices import host_memory
from worker.host.host import Host
from worker.program import hostile_folder, processes, spare
from worker.program.processes import Tag
from worker.program.spare import Spare
from worker.program.workdir import Workdir

log = structlog.get_logger()
SeatT = TypeVar("SeatT", bound="WarmSeat")

LOOK_SECONDS: Final = 1.0
# What one holds once it has imported everything, measured on CPU and rounded up (docs/trainer.md).
SPARE_BYTES: Final = 1024**3
# Parts of the host's memory that must be free for a spare to be started, and for it to stay.
ROOM_TO_START: Final = 0.25
ROOM_TO_STAY: Final = 0.1


def may_stay(*, total: int, available: int) -> bool:
    """Whether a host of `total` bytes with `available` left has memory for a spare that is there. Pure."""
    return available >= ROOM_TO_STAY * total


def may_start(*, total: int, available: int, held: int = 0) -> bool:
    """Whether it has memory for one more, which holds a base model of `held` bytes. Pure."""
    return available - SPARE_BYTES - held >= ROOM_TO_START * total


class LikelyBase(Protocol):
    """A base model that the next work of a seat most likely needs, and that a spare can hold."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int:
        """About what it takes in memory."""
        ...

    def held_by(self, folder: Workdir) -> HeldBase | None:
        """The orders for a spare with this folder; None: it is no good after all."""
        ...


class WarmSeat(ABC):
    """One seat of this host. Made with its lock held."""

    lane: ClassVar[Lane]
    called: ClassVar[str]  # as the job of its spare's tag

    def __init__(
        self,
        host: Host,
        number: int,
        lock: IO[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], tuple[int, int]] = host_memory,
    ) -> None:
        self._host, self.number, self._lock = host, number, lock
        self._clock, self._memory = clock, memory
        self._spare: Spare | None = None
        self._said_ready = False
        self._base_name: str | None = None  # of what ours holds
        self._loading: IO[str] | None = None  # while ours loads no other of this host does
        # A child that was killed in this seat may have been rung for work: look at once.
        self._look_at = 0.0 if host.flags.is_kept(number) else clock() + self._pause
        self._start_at = self._look_for_base_at = 0.0
        hostile_folder.remove(self._place)  # of one that was killed here
        host.flags.cool(number)
        host.flags.sit(number)

    @property
    @abstractmethod
    def program(self) -> str:
        """The module that is started ahead."""

    @property
    @abstractmethod
    def waits_for(self) -> str:
        """What it waits for, in the log."""

    @abstractmethod
    def variables(self, tag: Tag, out: Path) -> dict[str, str]:
        """The environment of the program that is started ahead."""

    def is_free(self) -> bool:
        """Whether a program may be started ahead now."""
        return True

    def likely_base(self) -> LikelyBase | None:
        """The base model that the program which is started ahead is to hold, if it is to hold one."""
        return None

    @property
    def _place(self) -> Path:
        return self._host.work / spare.SPARE / str(self.number)

    @property
    def _pause(self) -> float:
        """Seconds after which we look for work though no bell has rung: sooner than anybody is sent in our place."""
        return self._host.settings.sweep_seconds / 2

    def wait(self) -> bool:
        """Until there may be work, with a spare; False when nobody is to wait here any more."""
        flags = self._host.flags
        flags.sit(self.number)
        with flags.idle_at_seat(self.lane, child=processes.child_number()):
            while not flags.draining:
                if self._clock() >= self._look_at:
                    self._look_at = self._clock() + self._pause
                    return True
                if not self._tend():
                    return False
                if flags.hears(self.number, seconds=LOOK_SECONDS):
                    return True
        return False

    def give_if(self, unfit: str | None) -> Spare | None:
        """The spare, unless `unfit` or its state speaks against it; it is the caller's from now on. Else none is left.

        Raises StillAlive.
        """
        self._host.flags.rise(self.number)
        ours, self._spare = self._spare, None
        self._loaded()
        if ours is None:
            return None
        reason = unfit or ours.reason_not_to_give()
        if reason is None:
            return ours
        log.info("spare.not_used", waits_for=self.waits_for, reason=reason)
        ours.remove()
        return None

    def let_go(self, reason: str) -> None:
        """End the spare, if there is one. Raises StillAlive."""
        ours, self._spare = self._spare, None
        self._host.flags.cool(self.number)
        self._loaded()
        if ours is not None:
            log.info("spare.let_go", waits_for=self.waits_for, reason=reason)
            ours.remove()

    def rise(self, reason: str) -> None:
        """Let the next work be for anybody, without a spare. Raises StillAlive."""
        self._host.flags.rise(self.number)
        self.let_go(reason)

    def leave(self) -> None:
        try:
            self.rise("its seat is given up")
        finally:
            self._lock.close()

    # --- the spare --------------------------------------------------------------------------------------------------

    def _tend(self) -> bool:
        """Have a living spare, as far as that may be now; False: nobody needs to wait here."""
        total, available = self._memory()
        if not may_stay(total=total, available=available):
            self.let_go(f"the host has {available >> 20:,} MiB of memory left")
            return False
        if self._spare is None:
            return self._start(total, available)
        if (fault := self._spare.fault()) is not None:
            log.warning("spare.lost", waits_for=self.waits_for, reason=fault)
            self.let_go(fault)
            self._start_at = self._clock() + self._pause
        elif self._spare.ready and not self._said_ready:
            self._say_ready(self._spare)
        elif self._spare.ready and self._spare.held is None and self._find_base(total, available) is not None:
            self.let_go("its base model is prepared now")  # and one that holds it is started
        return True

    def _say_ready(self, ours: Spare) -> None:
        self._said_ready = True
        self._loaded()
        log.info(
            "spare.ready",
            waits_for=self.waits_for,
            pid=ours.pid,
            seconds=round(ours.age, 1),
            held_mib=ours.held_bytes >> 20,
            base=self._base_name,
        )
        if self._base_name is not None:
            self._host.flags.warm(self.number, self._base_name)

    def _find_base(self, total: int, available: int) -> LikelyBase | None:
        """The likely base, if a spare may hold it now. Looks now and then."""
        if self._clock() < self._look_for_base_at:
            return None
        base = self.likely_base()
        if base is not None and may_start(total=total, available=available, held=base.bytes):
            return base
        self._look_for_base_at = self._clock() + self._pause
        return None

    def _start(self, total: int, available: int) -> bool:
        if self._clock() < self._start_at:
            return True
        if not may_start(total=total, available=available) or not self.is_free():
            return False
        self._loading = locked(self._host.settings.home.resolve() / "loading.lock")
        if self._loading is None:
            return True
        base = self._find_base(total, available)
        try:
            self._spare = spare.start(
                self.program,
                place=self._place,
                home=self._host.settings.home.resolve(),
                environment=self.variables,
                uid=self._host.trainer_uid,
                isolation=self._host.isolation,
                hold=spare.nothing if base is None else base.held_by,
                called=self.called,
            )
        except OSError as error:
            log.warning("spare.not_started", waits_for=self.waits_for, error=str(error)[:200])
            self._loaded()
            return False
        self._said_ready = False
        if base is not None and self._spare.held is None:  # no good, and cannot be removed: not until the next work
            self._look_for_base_at, base = math.inf, None
        self._base_name = None if base is None else base.name
        log.info("spare.started", waits_for=self.waits_for, pid=self._spare.pid, base=self._base_name)
        return True

    def _loaded(self) -> None:
        if self._loading is not None:
            self._loading.close()
            self._loading = None


@contextlib.contextmanager
def left_at_the_end(seat: SeatT | None) -> Iterator[SeatT | None]:
    """A seat that was taken, if one was, until the end of the block."""
    try:
        yield seat
    finally:
        if seat is not None:
            seat.leave()


def leased(host: Host) -> set[str]:
    """Ids of this worker's devices that jobs have."""
    return set(host.write(lambda s: workers.leased_devices(s, host.worker.id)))


def locked(file: Path) -> IO[str] | None:
    """The open file, locked until it is closed or this process ends; None while another has it."""
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
