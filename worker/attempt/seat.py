"""The seats of devices: at each, a child process of the worker waits for the next job with a trainer started ahead."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from shared.contract.spec import JobSpec
from shared.lease.values import Claim
from shared.store.bell import ring
from shared.store.lifecycle import Lane
from worker.attempt import held_base
from worker.attempt.attempt_folder import trainer_variables
from worker.attempt.held_base import FoundBase
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.host.seating import WarmSeat, leased, left_at_the_end, locked
from worker.program import spare
from worker.program.processes import Tag
from worker.program.spare import Spare


class DeviceSeat(WarmSeat):
    """One device's."""

    lane: ClassVar[Lane] = "training"
    called: ClassVar[str] = spare.SPARE

    _last: JobSpec | None = None  # of the last attempt here

    @property
    def device(self) -> FoundDevice:
        return self._host.devices[self.number]

    @property
    def device_id(self) -> str:
        return f"{self._host.worker.host}:{self.device.uuid}"

    @property
    def program(self) -> str:
        return self._host.settings.trainer

    @property
    def waits_for(self) -> str:
        return f"a job on {self.device_id}"

    def variables(self, tag: Tag, out: Path) -> dict[str, str]:
        return trainer_variables(self._host, self.device, (self.device_id,), tag, out)

    def is_free(self) -> bool:
        """A sibling may have the device, for a job on several."""
        return self.device_id not in leased(self._host)

    def likely_base(self) -> FoundBase | None:
        """That of the last job here."""
        if self._host.settings.keep_warm != "base" or self._last is None:
            return None
        return held_base.find(self._host, self._last, device=self.device)

    def give(self, claim: Claim) -> Spare | None:
        """The spare for this attempt, if it is one for it; it is the attempt's from now on. Else none is left."""
        assert claim.spec is not None, "a queued job is resolved"
        self._last, self._look_for_base_at = claim.spec, 0.0
        alone = claim.spec.placement.strategy == "single" and claim.device_ids == (self.device_id,)
        if claim.companions:
            return self.give_if("the attempt trains together with others")
        return self.give_if(None if alone else "the attempt has other devices, or several")


def taken(host: Host) -> AbstractContextManager[DeviceSeat | None]:
    """A seat that nobody has, until the end of the block; None when there is none, or none is wanted."""
    return left_at_the_end(_take(host))


def _take(host: Host) -> DeviceSeat | None:
    if host.settings.keep_warm == "off" or host.flags.draining or not host.flags.seats:
        return None
    busy = leased(host)
    for number in host.flags.seats:
        if f"{host.worker.host}:{host.devices[number].uuid}" in busy:
            continue
        lock = locked(host.settings.home.resolve() / f"seat-{number}.lock")
        if lock is not None:
            if len(host.flags.kept) + 1 < len(host.flags.seats):
                ring("training", host.settings)  # somebody for the next device
            return DeviceSeat(host, number, lock)
    return None


def left_to_others(host: Host, ours: DeviceSeat | None) -> set[str]:
    """Devices whose next job is not for this process: from a seat, all others; else those at which a sibling sits."""
    numbers = host.flags.kept if ours is None else set(host.flags.seats) - {ours.number}
    return {f"{host.worker.host}:{host.devices[number].uuid}" for number in numbers}
