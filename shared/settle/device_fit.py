"""On which devices a settled job fits, and why not on the others. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.contract.spec import DeviceKind, JobSpec
from shared.plan.capacity import ANY, Abilities
from shared.plan.fairshare import Policy
from shared.settle.calibration import Measurement
from shared.settle.memory_fit import calibration, peak
from shared.settle.settling import DeviceFacts
from shared.settle.sizing import GIB
from shared.settle.workload import workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device of the pool. Sizes are bytes."""

    id: str
    name: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int  # when no job is there
    foreign_bytes: int
    bfloat16: bool
    usable: bool  # healthy and not quarantined
    busy: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether the job fits a device, what it needs there, and a sentence why."""

    id: str
    name: str
    kind: DeviceKind
    fits: bool
    needed_bytes: int
    offered_bytes: int
    reason: str


# NVIDIA's Ampere; CUDA's libraries emulate bfloat16 before it, and Triton's kernels refuse it.
_BFLOAT16_CAPABILITY: Final = 80


def needs(spec: JobSpec, device: DeviceFacts) -> Abilities:
    """What a job settled for `device` asks of its devices besides memory.

    A job settled for a CPU asks for nothing: all that it does a GPU does as well.
    """
    gpu = device.kind == "cuda"
    bfloat16 = spec.training.dtype == "bfloat16" and device.bfloat16
    return Abilities(
        # A CPU does not train in float16, whatever the job allows.
        gpu=gpu and (not spec.placement.allow_cpu or spec.training.dtype == "float16"),
        bfloat16=bfloat16,
        capability=_BFLOAT16_CAPABILITY if gpu and bfloat16 else 0,
    )


def offered(kind: DeviceKind, *, total: int, free: int, foreign: int) -> int:
    """Bytes that a device has for a job that is settled now, as the plan will find them."""
    if kind == "cpu":  # what is free there changes by the second
        return total - foreign
    leaving = foreign if foreign > Policy().foreign_tolerance_bytes else 0
    return min(total, free + leaving)


def fits(
    spec: JobSpec, devices: Sequence[Candidate], *, measurements: Sequence[Measurement], abilities: Abilities = ANY
) -> list[Fit]:
    """The verdict on each device, in the order given. `abilities`: what the job needs besides memory."""
    return [_fit(spec, device, measurements=measurements, abilities=abilities) for device in devices]


def _fit(spec: JobSpec, device: Candidate, *, measurements: Sequence[Measurement], abilities: Abilities) -> Fit:
    work = workload(spec, device=device.kind, memory=device.total_bytes)
    correction = calibration(work, spec=spec, measurements=measurements)
    needed = correction.upper(peak(work).total)
    room = device.total_bytes - device.foreign_bytes
    if device.kind != "cpu":
        room = min(room, device.free_bytes)
    obstacle = _unable(device, abilities) or _obstacle(spec, device, needed=needed, offered=room)
    free = "busy now" if device.busy else "free now"
    return Fit(
        id=device.id,
        name=device.name,
        kind=device.kind,
        fits=obstacle is None,
        needed_bytes=needed,
        offered_bytes=room,
        reason=obstacle or f"needs {needed / GIB:.1f} of {room / GIB:.1f} GiB ({correction.sure}); {free}",
    )


def _unable(device: Candidate, abilities: Abilities) -> str | None:
    if abilities.gpu and device.kind == "cpu":
        return "the job is settled for a GPU and does not start on a CPU; placement.allow_cpu lets it"
    if abilities.bfloat16 and not device.bfloat16:
        return "computes in no bfloat16; set training.dtype to float16"
    return None


def _obstacle(spec: JobSpec, device: Candidate, *, needed: int, offered: int) -> str | None:
    if not device.usable:
        return "the device is unhealthy or quarantined"
    if needed > offered:
        others = f" ({device.foreign_bytes / GIB:.1f} GiB are held by others)" if device.foreign_bytes else ""
        return (
            f"needs {needed / GIB:.1f} GiB, it offers {offered / GIB:.1f} GiB{others}; lower training.max_length or"
            " the micro-batch, set gradient_checkpointing, or use method qlora"
        )
    if device.kind == "cuda" and spec.training.dtype == "bfloat16" and not device.bfloat16:
        return "computes in no bfloat16; set training.dtype to float16"
    if device.kind == "cpu" and spec.training.dtype == "float16":
        return "a CPU does not train in float16; set training.dtype to bfloat16 or float32"
    return None
