"""Where an evaluation's program works: a GPU that no training has or wants, else the host's processor.

Trainings go first: on a GPU an evaluation is a guest, which leaves when a training wants the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from shared.chores import evaluations
from shared.contract.generation import Target
from shared.contract.spec import Dtype
from shared.errors import TunepoolError
from shared.fleet import playgrounds
from worker.chores.playground_program import BESIDE_BYTES
from worker.host import devices
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.program import launcher
from worker.program.processes import Tag

_BYTES: Final[dict[Dtype, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}


class EvaluationDeferred(TunepoolError):
    """Others go first; it costs no try. `seconds`: until it may be tried again, None for the usual."""

    code = "device_wanted"
    seconds: float | None = None


class NoRoom(EvaluationDeferred):
    """The host's memory is in others' hands now."""

    code = "host_memory_taken"


def chosen(host: Host, targets: Iterable[Target]) -> FoundDevice:
    """The device for a program that answers for these. Raises NoRoom."""
    here = devices.discover(host.settings)
    needed = max(map(_needs, targets))
    for device in here:
        if device.kind != "cpu" and device.healthy and device.free_bytes > needed and not wanted(host, device):
            return device
    _, available = devices.host_memory()
    if needed > available:
        raise NoRoom(
            f"About {needed / 2**30:.1f} GiB are needed, of this host's memory {available / 2**30:.1f} GiB are "
            f"free now. It is tried again after {evaluations.RETRY_AFTER.seconds} seconds, as often as it takes."
        )
    slot = processor(host, here)
    if wanted(host, slot):
        raise NoRoom("A training waits for this host's memory. The evaluation is tried again when it has begun.")
    return slot


def processor(host: Host, here: Iterable[FoundDevice]) -> FoundDevice:
    """The processor among the devices `here`, or beside them."""
    return next((device for device in here if device.kind == "cpu"), None) or devices.cpu(host.settings)[0]


def _needs(target: Target) -> int:
    """Bytes of a program for a target."""
    return target.base.facts.parameters * _BYTES[target.dtype or "float32"] + BESIDE_BYTES


def device_id(host: Host, device: FoundDevice) -> str:
    return f"{host.worker.host}:{device.uuid}"


def wanted(host: Host, device: FoundDevice) -> bool:
    """Whether a training has the device or waits for one. A CPU is shared while there is memory for both."""
    pressure = host.write(lambda s: playgrounds.pressure(s, device_ids=[device_id(host, device)]))
    if device.kind != "cpu":
        return pressure.leased or pressure.waiting_bytes > 0
    _, available = devices.host_memory()
    # While another training has the slot, the one that waits could not begin anyway.
    return not pressure.leased and pressure.waiting_bytes > available


def threads(host: Host, device: FoundDevice) -> int:
    return device.cores or host.settings.cpu_threads or os.cpu_count() or 1


def variables(host: Host, device: FoundDevice, tag: Tag, out: Path) -> dict[str, str]:
    """The environment of an evaluation's program on this device, started cold or ahead."""
    return launcher.environment(
        tag=tag,
        device_ids=() if device.kind == "cpu" else (device_id(host, device),),
        kind=device.kind,
        threads=threads(host, device),
        scratch=out,
    )
