"""NVIDIA GPUs as NVML shows them: memory, strangers, MIG slices, ECC health, and the Xid errors of the driver.

NVML sees strangers' processes that no table of ours knows (clearml #71: a pool pulled work though the GPU was in use).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import pynvml
import structlog

from worker.host.found_device import FoundDevice
from worker.host.remedies import Driver

log = structlog.get_logger()

# Ampere is the first architecture with bfloat16 arithmetic (CUDA C Programming Guide, compute capability 8.0).
_BFLOAT16_CAPABILITY: Final = (8, 0)
# Xids that a user's program causes and a healthy GPU survives; the same as NVIDIA's k8s-device-plugin leaves out.
APPLICATION_XIDS: Final = frozenset({13, 31, 43, 45, 68, 109})
# What one look takes in at most: a GPU that spits errors must not hold up the report.
XIDS_PER_LOOK: Final = 100
# Each is there only while NVIDIA's driver is: its files in a container that may use it, its state in the kernel.
SIGNS: Final = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))


def gpus(
    *,
    own_pids: Collection[int],
    ailments: Mapping[str, str],
    nvml: Any = pynvml,
    signs: Sequence[Path] = SIGNS,
) -> tuple[FoundDevice, ...]:
    """Every GPU or MIG slice; none where there is no driver.

    Where there is a driver and it shows no GPU, one ailing device stands for all of them: a host with GPUs must not
    become a host that trains on its CPU.

    Args:
        own_pids: processes whose memory is ours, not a stranger's.
        ailments: GPU uuid -> what `XidWatch` has heard.
        nvml: the library, or something that answers like it.
        signs: files that are there only while a driver is.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _mute(str(error)) if any(sign.exists() for sign in signs) else ()
    try:
        count = nvml.nvmlDeviceGetCount()
        devices = tuple(device for index in range(count) for device in _gpu(nvml, index, own_pids, ailments))
    except nvml.NVMLError as error:
        return _mute(str(error))
    finally:
        nvml.nvmlShutdown()
    if not devices and (count or any(sign.exists() for sign in signs)):
        return _mute(f"{count} GPUs, and none can be read")
    return devices


# The uuid of what stands for GPUs that a driver does not show.
MUTE: Final = "nvidia-driver"


def _mute(why: str) -> tuple[FoundDevice, ...]:
    """The device that stands for GPUs whose driver shows none."""
    ailment = (
        f"an NVIDIA driver is loaded and shows no GPU that works ({why[:200]}): see `nvidia-smi` and the kernel log; "
        "after an upgrade of the driver, reboot; to train on the CPU all the same, set TUNEPOOL_DEVICES=cpu"
    )
    return (
        FoundDevice(
            uuid=MUTE,
            kind="cuda",
            name="NVIDIA GPUs",
            total_bytes=0,
            free_bytes=0,
            foreign_bytes=0,
            bfloat16=False,
            ailment=ailment,
        ),
    )


def driver(nvml: Any = pynvml) -> Driver | None:
    """The driver's version, or None where it does not tell."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 12040 is 12.4
        return Driver(_text(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, own_pids: Collection[int], ailments: Mapping[str, str]) -> list[FoundDevice]:
    """The GPU as one device, or its MIG slices where it is cut into some; nothing when it fell off the bus.

    A device that is registered and no longer found is reported unhealthy (shared/fleet/workers.py).
    """
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        ailment = ailments.get(_text(nvml.nvmlDeviceGetUUID(handle))) or _memory_ailment(nvml, handle)
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
        return [
            _device(
                nvml,
                part,
                name=_text(nvml.nvmlDeviceGetName(handle)),
                ailment=ailment,
                capability=capability,
                own_pids=own_pids,
            )
            for part in _mig_slices(nvml, handle) or [handle]
        ]
    except nvml.NVMLError as error:
        log.warning("device.unreadable", index=index, error=str(error)[:200])
        return []


def _device(
    nvml: Any,
    handle: Any,
    *,
    name: str,
    ailment: str | None,
    capability: tuple[int, ...],
    own_pids: Collection[int],
) -> FoundDevice:
    total, free = _memory(nvml, handle)
    # In a container other pid spaces show no memory (None): then a stranger is seen only by what is not free.
    held = {
        process.pid: process.usedGpuMemory or 0
        for process in _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle, default=[])
    }
    ours = sum(held[pid] for pid in held if pid in own_pids)
    return FoundDevice(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        kind="cuda",
        name=name,
        total_bytes=total,
        # What our own trainer holds is free once it has ended; the row is read when it has, before the next look.
        free_bytes=min(total, free + ours),
        foreign_bytes=sum(held.values()) - ours,
        ailment=ailment,
        bfloat16=capability >= _BFLOAT16_CAPABILITY,
        capability=capability[0] * 10 + capability[1],
        readings=_readings(nvml, handle),
    )


def _readings(nvml: Any, handle: Any) -> dict[str, float] | None:
    """How much it computes (of 1), draws and heats, as far as it tells: MIG slices and vGPUs tell little."""
    computes = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle, default=None)
    milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle, default=None)
    celsius = _ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU, default=None)
    readings = {
        "utilization": None if computes is None else computes.gpu / 100,
        "watts": None if milliwatts is None else milliwatts / 1000,
        "celsius": celsius,
    }
    return {name: float(value) for name, value in readings.items() if value is not None} or None


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(total, free) bytes. A GPU that shares the host's memory (GB10, Jetson) has none of its own and NVML says so."""
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    if memory is None:
        host = psutil.virtual_memory()
        return int(host.total), int(host.available)
    return int(memory.total), int(memory.free)


def _mig_slices(nvml: Any, handle: Any) -> list[Any]:
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    if mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    slices = (
        _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index, default=None) for index in range(count)
    )
    return [part for part in slices if part is not None]


def _memory_ailment(nvml: Any, handle: Any) -> str | None:
    """An uncorrected memory error since boot, a page that waits to be retired, a row remapping that waits or failed.

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
    if errors:
        return f"{errors} uncorrected ECC errors since boot; reset the GPU"
    if pending:
        return "memory pages wait to be retired; reset the GPU"
    if remapped[3]:
        return "a row remapping failed; replace the GPU"
    return "a broken row of memory waits to be remapped; reset the GPU" if remapped[2] else None


def _ask(nvml: Any, question: Any, *arguments: Any, default: Any) -> Any:
    """NVML's answer, or `default` where this GPU has none; a GPU that is gone answers nothing and raises.

    Under WSL, on vGPUs and on Jetson many questions end in Unknown or FunctionNotFound, on a GPU that works.
    """
    try:
        return question(*arguments)
    except nvml.NVMLError_GpuIsLost:
        raise
    except nvml.NVMLError:
        return default


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class XidWatch:
    """Remembers critical driver errors of each GPU for as long as this worker lives. For one thread of one process.

    NVML tells an Xid only to who has asked for it before, so this holds the library open between looks.
    """

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._events: Any = None
        self._heard: dict[str, str] = {}

    def look(self) -> dict[str, str]:
        """GPU uuid -> its critical error, for every GPU that has had one since the first look."""
        try:
            if self._events is None:
                self._listen()
            for _ in range(XIDS_PER_LOOK):
                self._hear(self._nvml.nvmlEventSetWait_v2(self._events, 0))
        except self._nvml.NVMLError_Timeout:
            pass  # nothing more has happened
        except self._nvml.NVMLError as error:
            log.debug("xid.unheard", error=str(error)[:200])  # no driver, or a GPU that cannot tell
        return dict(self._heard)

    def _listen(self) -> None:
        nvml = self._nvml
        nvml.nvmlInit()
        events = nvml.nvmlEventSetCreate()
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            _ask(nvml, nvml.nvmlDeviceRegisterEvents, handle, nvml.nvmlEventTypeXidCriticalError, events, default=None)
        self._events = events

    def _hear(self, event: Any) -> None:
        xid = int(event.eventData)
        if event.eventType != self._nvml.nvmlEventTypeXidCriticalError or xid in APPLICATION_XIDS:
            return
        uuid = _text(self._nvml.nvmlDeviceGetUUID(event.device))
        self._heard[uuid] = f"the driver reported Xid {xid}; see the kernel log, then restart this worker"
        log.error("device.xid", uuid=uuid, xid=xid)
