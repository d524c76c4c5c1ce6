"""Which devices this worker has, what is really free on them, and whether they are fit to work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import pynvml

from shared.settings import Settings
from worker.host import nvml as nvidia
from worker.host import processor_rates, rocm
from worker.host.found_device import FoundDevice

CPU_SHARE: Final = 0.8
_BFLOAT16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Levels of ONEDNN_MAX_CPU_ISA below the first with products of bfloat16 (oneDNN's guide, "CPU Dispatcher Control").
_BEFORE_BFLOAT16: Final = frozenset(
    {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
)
_CGROUP: Final = Path("/sys/fs/cgroup")


class NoSuchDevice(Exception):
    """TUNEPOOL_DEVICES names what this host does not have; the message says what it has."""


def discover(
    settings: Settings,
    *,
    own_pids: Collection[int] = (),
    ailments: Mapping[str, str] | None = None,
    nvml: Any = pynvml,
    load_amdsmi: Callable[[], Any] = rocm.load_amdsmi,
    driver_signs: Sequence[Path] = nvidia.SIGNS,
) -> tuple[FoundDevice, ...]:
    """The devices of this worker: the host's GPUs, or its CPU where there is none; `settings.devices` narrows.

    Args:
        own_pids: processes whose use of memory is ours, not a stranger's.
        ailments: GPU uuid -> why it must not be used (`nvml.XidWatch`).
        driver_signs: files that show that NVIDIA's driver is loaded, whether or not NVML works.

    Raises:
        NoSuchDevice: nothing of what the setting names is there.
    """
    if settings.devices == "cpu":
        return cpu(settings, own_pids=own_pids)
    devices = (
        _visible(nvidia.gpus(own_pids=own_pids, ailments=ailments or {}, nvml=nvml, signs=driver_signs), settings)
        or rocm.gpus(own_pids=own_pids, load=load_amdsmi)
        or cpu(settings, own_pids=own_pids)
    )
    return devices if devices[0].uuid == nvidia.MUTE else _narrowed(devices, settings.devices)


def _visible(gpus: tuple[FoundDevice, ...], settings: Settings) -> tuple[FoundDevice, ...]:
    """Those that CUDA_VISIBLE_DEVICES names. As for CUDA a uuid may be cut, and the first unknown name ends the list.

    Raises:
        NoSuchDevice: it names none that is there.
    """
    wanted = settings.visible_gpus
    if not gpus or not wanted or gpus[0].uuid == nvidia.MUTE:
        return gpus
    seen: list[FoundDevice] = []
    for name in (part.strip() for part in wanted.split(",")):
        whole = name if len(name) > len("GPU-") else None
        named = [gpu for index, gpu in enumerate(gpus) if name == str(index) or (whole and gpu.uuid.startswith(whole))]
        if len(named) != 1:
            break
        seen.extend(named)
    if not seen and wanted not in {"-1", "NoDevFiles"}:
        raise NoSuchDevice(f"CUDA_VISIBLE_DEVICES={wanted}: this host has {', '.join(gpu.uuid for gpu in gpus)}.")
    return tuple(seen)


def _narrowed(devices: tuple[FoundDevice, ...], wanted: str) -> tuple[FoundDevice, ...]:
    if wanted == "all":
        return devices
    names = [name.strip() for name in wanted.split(",")]
    kept = tuple(device for index, device in enumerate(devices) if str(index) in names or device.uuid in names)
    if not kept:
        raise NoSuchDevice(f"TUNEPOOL_DEVICES={wanted}: this host has {', '.join(device.uuid for device in devices)}.")
    return kept


def without_driver(pci: Path = Path("/sys/bus/pci/devices")) -> int:
    """How many NVIDIA GPUs this host has in its slots, whether or not a driver serves them (PCI classes 03xx)."""
    return sum(
        _first(card / "vendor") == "0x10de" and _first(card / "class").startswith("0x03") for card in pci.glob("*")
    )


def _first(file: Path) -> str:
    return next(iter(_lines(file)), "")


def cpu(
    settings: Settings,
    *,
    own_pids: Collection[int] = (),
    cpuinfo: Path = processor_rates.CPUINFO,
    cgroup: Path = _CGROUP,
) -> tuple[FoundDevice, ...]:
    """The processor and a share of the memory, as one device or as `settings.cpu_slots` equal ones."""
    total, available = host_memory(cgroup)
    slots = settings.cpu_slots
    offered = (settings.cpu_memory_bytes or int(total * CPU_SHARE)) // slots
    # What our own trainers hold is free once they have ended; the row is read when they have, before the next look.
    free = min(offered, available + sum(map(_private_bytes, own_pids)))
    cores = max(1, (settings.cpu_threads or os.cpu_count() or 1) // slots)
    machine = processor_rates.this_machine(threads=cores, cpuinfo=cpuinfo)
    rates = processor_rates.known(settings, machine)
    return tuple(
        FoundDevice(
            uuid="cpu" if slots == 1 else f"cpu-{slot}",
            kind="cpu",
            name="CPU" if slots == 1 else f"CPU {slot + 1}/{slots}",
            total_bytes=offered,
            free_bytes=free,
            foreign_bytes=0,
            bfloat16=_computes_bfloat16(machine.flags.split(), newest=settings.cpu_instructions)
            if rates is None
            else rates.bfloat16_is_clearly_faster,
            cores=cores,
            probed=None if rates is None else f"measured: {rates}",
        )
        for slot in range(slots)
    )


def _computes_bfloat16(flags: Collection[str], *, newest: str) -> bool:
    """Whether the processor has products of bfloat16 and oneDNN may use them: what decides until it was measured."""
    return newest.upper() not in _BEFORE_BFLOAT16 and not _BFLOAT16_FLAGS.isdisjoint(flags)


def host_memory(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """(total, available) bytes of this host, or of the container that we are in (cgroup v2)."""
    host = psutil.virtual_memory()
    limit = next(iter(_lines(cgroup / "memory.max")), "max")
    if limit == "max":
        return host.total, host.available
    used = int(next(iter(_lines(cgroup / "memory.current")), "0"))
    # The kernel gives up files that nobody reads before it runs out, so they count as free (as docker stats does).
    cached = next((line for line in _lines(cgroup / "memory.stat") if line.startswith("inactive_file ")), "0 0")
    free = int(limit) - used + int(cached.split()[1])
    return min(host.total, int(limit)), max(0, min(host.available, free))


def _private_bytes(pid: int) -> int:
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        return int(psutil.Process(pid).memory_full_info().uss)
    return 0


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
