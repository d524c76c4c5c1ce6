"""A seat: where one child process of the worker waits for the next job of one device, with a spare at hand.

A trainer can only be watched, and proven dead, by the process that started it. So the child that starts a spare stays
in its pull and is the one that claims the next job of that device; its siblings pass their bells on to it and leave
that device alone. Who has a seat is a lock of the kernel, which a killed child does not keep.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Final

import structlog

from shared.contract.spec import JobSpec
from shared.fleet import workers
from shared.lease.values import Claim
from shared.store.bell import ring
from worker.attempt import held_base
from worker.attempt.attempt_folder import trainer_variables
from worker.attempt.held_base import FoundBase
from worker.host.devices import host_memory
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.program import hostile_folder, processes, spare
from worker.program.spare import Spare

log = structlog.get_logger()

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


class WarmSeat:
    """One device's. Made with its lock held."""

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
        # A child that was killed in this seat may have been rung for a job: look at once.
        self._look_at = clock() + self._pause if number not in host.flags.kept else 0.0
        self._start_at = 0.0
        self._last: JobSpec | None = None  # of the last attempt here
        self._look_for_base_at = 0.0
        hostile_folder.remove(self._place)  # of one that was killed here
        host.flags.cool(number)
        host.flags.sit(number)

    @property
    def device(self) -> FoundDevice:
        return self._host.devices[self.number]

    @property
    def device_id(self) -> str:
        return f"{self._host.worker.host}:{self.device.uuid}"

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
        with flags.idle_at_seat(child=processes.child_number()):
            while not flags.draining:
                if self._clock() >= self._look_at:
                    self._look_at = self._clock() + self._pause
                    return True
                if not self._tend():
                    return False
                if flags.hears(self.number, seconds=LOOK_SECONDS):
                    return True
        return False

    def give(self, claim: Claim) -> Spare | None:
        """The spare for this attempt, if it is one for it; it is the attempt's from now on. Else none is left."""
        self._host.flags.rise(self.number)
        self._last, self._look_for_base_at = claim.spec, 0.0
        ours, self._spare = self._spare, None
        self._loaded()
        if ours is None:
            return None
        assert claim.spec is not None, "a queued job is resolved"
        alone = claim.spec.placement.strategy == "single" and claim.device_ids == (self.device_id,)
        reason = ours.reason_not_to_give() if alone else "the attempt has other devices, or several"
        if reason is None:
            return ours
        log.info("spare.not_used", job_id=claim.lease.id, reason=reason)
        ours.remove()
        return None

    def let_go(self, reason: str) -> None:
        """End the spare, if there is one. Raises StillAlive."""
        ours, self._spare = self._spare, None
        self._host.flags.cool(self.number)
        self._loaded()
        if ours is not None:
            log.info("spare.let_go", device=self.device_id, reason=reason)
            ours.remove()

    def rise(self, reason: str) -> None:
        """Let the next job of the device be for anybody, without a spare. Raises StillAlive."""
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
            log.warning("spare.lost", device=self.device_id, reason=fault)
            self.let_go(fault)
            self._start_at = self._clock() + self._pause
        elif self._spare.ready and not self._said_ready:
            self._said_ready = True
            self._loaded()
            log.info(
                "spare.ready",
                device=self.device_id,
                pid=self._spare.pid,
                seconds=round(self._spare.age, 1),
                held_mib=self._spare.held_bytes >> 20,
                base=self._base_name,
            )
            if self._base_name is not None:
                self._host.flags.warm(self.number, self._base_name)
        elif self._spare.ready and self._spare.held is None and self._find_base(total, available) is not None:
            self.let_go("its base model is prepared now")  # and one that holds it is started
        return True

    def _find_base(self, total: int, available: int) -> FoundBase | None:
        """The base model of the last job here, if a spare may hold it now. Looks now and then."""
        if self._host.settings.keep_warm != "base" or self._last is None or self._clock() < self._look_for_base_at:
            return None
        base = held_base.find(self._host, self._last, device=self.device)
        if base is not None and may_start(total=total, available=available, held=base.bytes):
            return base
        self._look_for_base_at = self._clock() + self._pause
        return None

    def _start(self, total: int, available: int) -> bool:
        if self._clock() < self._start_at:
            return True
        if not may_start(total=total, available=available):
            return False
        if self.device_id in _leased(self._host):
            return False  # a sibling has it, for a job on several devices
        self._loading = _locked(self._host.settings.home.resolve() / "loading.lock")
        if self._loading is None:
            return True
        settings = self._host.settings
        base = self._find_base(total, available)
        try:
            self._spare = spare.start(
                settings.trainer,
                place=self._place,
                home=settings.home.resolve(),
                environment=partial(trainer_variables, self._host, self.device, (self.device_id,)),
                uid=self._host.trainer_uid,
                isolation=self._host.isolation,
                hold=spare.nothing if base is None else base.held_by,
            )
        except OSError as error:
            log.warning("spare.not_started", device=self.device_id, error=str(error)[:200])
            self._loaded()
            return False
        self._said_ready = False
        if base is not None and self._spare.held is None:  # no good, and cannot be removed: not again for this job
            self._last = base = None
        self._base_name = None if base is None else base.name
        log.info("spare.started", device=self.device_id, pid=self._spare.pid, base=self._base_name)
        return True

    def _loaded(self) -> None:
        if self._loading is not None:
            self._loading.close()
            self._loading = None


@contextlib.contextmanager
def taken(host: Host) -> Iterator[WarmSeat | None]:
    """A seat that nobody has, until the end of the block; None when there is none, or none is wanted."""
    seat = _take(host)
    try:
        yield seat
    finally:
        if seat is not None:
            seat.leave()


def _take(host: Host) -> WarmSeat | None:
    if host.settings.keep_warm == "off" or host.flags.draining or not host.flags.seats:
        return None
    leased = _leased(host)
    for number in host.flags.seats:
        if f"{host.worker.host}:{host.devices[number].uuid}" in leased:
            continue
        lock = _locked(host.settings.home.resolve() / f"seat-{number}.lock")
        if lock is not None:
            if len(host.flags.kept) + 1 < len(host.flags.seats):
                ring("training", host.settings)  # somebody for the next device
            return WarmSeat(host, number, lock)
    return None


def left_to_others(host: Host, ours: WarmSeat | None) -> set[str]:
    """Devices whose next job is not for this process: from a seat, all others; else those at which a sibling sits."""
    numbers = host.flags.kept if ours is None else set(host.flags.seats) - {ours.number}
    return {f"{host.worker.host}:{host.devices[number].uuid}" for number in numbers}


def _leased(host: Host) -> set[str]:
    return set(host.write(lambda s: workers.leased_devices(s, host.worker.id)))


def _locked(file: Path) -> IO[str] | None:
    """The open file, locked until it is closed or this process ends; None while another has it."""
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
