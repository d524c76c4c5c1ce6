"""The seat of evaluations: a child process of the worker waits there for the next one with a program started ahead.

Who sits here does evaluations and nothing else: what descends from this process is the spare's, or its program's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from shared.store.lifecycle import Lane
from worker.chores import evaluation_device
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.host.seating import WarmSeat, leased, left_at_the_end, locked
from worker.program import spare
from worker.program.processes import Tag
from worker.program.spare import Spare


class EvaluationSeat(WarmSeat):
    """The one of this host. Its spare is for the device on which the next evaluation most likely works."""

    lane: ClassVar[Lane] = "cpu"
    called: ClassVar[str] = spare.EVALUATION_SPARE
    waits_for = "an evaluation"

    _device: FoundDevice | None = None  # of the spare

    @property
    def program(self) -> str:
        return self._host.settings.evaluator

    def variables(self, tag: Tag, out: Path) -> dict[str, str]:
        self._device = self._likely()
        return evaluation_device.variables(self._host, self._device, tag, out)

    def wait(self) -> bool:
        if self._spare is not None and not self._is_for(self._likely()):
            self.let_go("the next evaluation will have another device")
        return super().wait()

    def give(self, device: FoundDevice) -> Spare | None:
        """The spare for an evaluation on this device; it is the evaluation's from now on. Else none is left."""
        return self.give_if(None if self._is_for(device) else "the evaluation has another device")

    def _is_for(self, device: FoundDevice) -> bool:
        return self._device is not None and self._device.uuid == device.uuid

    def _likely(self) -> FoundDevice:
        """A GPU that no training has, else the processor."""
        host = self._host
        gpus = [device for device in host.devices if device.kind != "cpu"]
        busy = leased(host) if gpus else set()
        free = (device for device in gpus if evaluation_device.device_id(host, device) not in busy)
        return next(free, None) or evaluation_device.processor(host, host.devices)


def taken(host: Host) -> AbstractContextManager[EvaluationSeat | None]:
    """The seat, until the end of the block; None when another has it, or none is wanted."""
    return left_at_the_end(_take(host))


def _take(host: Host) -> EvaluationSeat | None:
    number = host.flags.evaluations
    if host.settings.keep_warm == "off" or host.flags.draining or number is None:
        return None
    lock = locked(host.settings.home.resolve() / f"seat-{number}.lock")
    return None if lock is None else EvaluationSeat(host, number, lock)
