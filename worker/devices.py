"""Which devices this host has, what is really free on them, and whether they are fit to work.

NVML sees strangers' processes that no table of ours knows (clearml #71: a pool pulled work though the GPU was in use).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import pynvml

from shared.settings import Settings

Kind = Literal["cuda", "cpu"]
CPU_SHARE: Final = 0.8
# Ampere is the first architecture with bfloat16 arithmetic (CUDA C Programming Guide, compute capability 8.0).
_BFLOAT16_CAPABILITY: Final = (8, 0)
_BFLOAT16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A device as the host shows it now; bytes of memory throughout."""

    uuid: str
    kind: Kind
    name: str
    total_bytes: int
    free_bytes: int
    foreign_bytes: int
    healthy: bool
    bfloat16: bool


def discover(settings: Settings, *, own_pids: Collection[int] = (), nvml: Any = pynvml) -> tuple[FoundDevice, ...]:
    """The GPUs of this host, or its CPU as one device where there is none.

    Args:
        own_pids: processes whose use of memory is ours, not a stranger's.
        nvml: the library, or something that answers like it.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return (cpu(settings),)
    try:
        count = nvml.nvmlDeviceGetCount()
        return (
            tuple(device for index in range(count) for device in _gpu(nvml, index, own_pids))
            if count
            else (cpu(settings),)
        )
    finally:
        nvml.nvmlShutdown()


def cpu(settings: Settings, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> FoundDevice:
    """The processor and a share of the memory, as one device."""
    memory = psutil.virtual_memory()
    offered = settings.cpu_memory_bytes or int(memory.total * CPU_SHARE)
    flags = next((line for line in _lines(cpuinfo) if line.startswith(("flags", "Features"))), "")
    return FoundDevice(
        uuid="cpu",
        kind="cpu",
        name="CPU",
        total_bytes=offered,
        free_bytes=offered,
        foreign_bytes=0,
        healthy=True,
        bfloat16=not _BFLOAT16_FLAGS.isdisjoint(flags.split()),
    )


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def _gpu(nvml: Any, index: int, own_pids: Collection[int]) -> list[FoundDevice]:
    """The GPU as one device, or its MIG slices where it is cut into some; nothing when it fell off the bus.

    A device that is registered and no longer found is reported unhealthy (shared/workers.py).
    """
    try:
        return _slices_or_whole(nvml, nvml.nvmlDeviceGetHandleByIndex(index), own_pids)
    except nvml.NVMLError:
        return []


def _slices_or_whole(nvml: Any, handle: Any, own_pids: Collection[int]) -> list[FoundDevice]:
    slices = _mig_slices(nvml, handle)
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    name, healthy = _text(nvml.nvmlDeviceGetName(handle)), _healthy(nvml, handle)
    return [
        _device(nvml, one, name=name, healthy=healthy, capability=capability, own_pids=own_pids)
        for one in slices or [handle]
    ]


def _device(
    nvml: Any, handle: Any, *, name: str, healthy: bool, capability: tuple[int, ...], own_pids: Collection[int]
) -> FoundDevice:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    running = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle, default=[])
    # In a container other pid spaces show no memory (None): then a stranger is seen only by what is not free.
    foreign = sum(process.usedGpuMemory or 0 for process in running if process.pid not in own_pids)
    return FoundDevice(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        kind="cuda",
        name=name,
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        foreign_bytes=int(foreign),
        healthy=healthy,
        bfloat16=capability >= _BFLOAT16_CAPABILITY,
    )


def _mig_slices(nvml: Any, handle: Any) -> list[Any]:
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    if mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    found = (
        _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index, default=None) for index in range(count)
    )
    return [one for one in found if one is not None]


def _healthy(nvml: Any, handle: Any) -> bool:
    """No uncorrected memory error since boot, no page waiting to be retired, no row remapping failed.

    Sources: NVIDIA's GPU memory error management guide, sections on page retirement and row remapping.
    """
    errors = _ask(
        nvml,
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
        default=0,
    )
    pending = _ask(nvml, nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle, default=0)
    remapped = _ask(nvml, nvml.nvmlDeviceGetRemappedRows, handle, default=(0, 0, 0, 0))
    return errors == 0 and pending == 0 and not remapped[3]


def _ask(nvml: Any, question: Any, *arguments: Any, default: Any) -> Any:
    """NVML's answer, or `default` where this GPU cannot answer; a GPU that is gone answers nothing and raises."""
    try:
        return question(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_NotFound,
        nvml.NVMLError_InvalidArgument,
        nvml.NVMLError_NoPermission,
    ):
        return default


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
