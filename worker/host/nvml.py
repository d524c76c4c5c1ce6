"""NVIDIA GPUs as NVML shows them: memory, strangers, MIG slices, ECC health, and the Xid errors of the driver.

NVML sees strangers' processes that no table of ours knows (clearml #71: a pool pulled work though the GPU was in use).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import pynvml
import structlog

from worker.host.found_device import FoundDevice

log = structlog.get_logger()

# Ampere is the first architecture with bfloat16 arithmetic (CUDA C Programming Guide, compute capability 8.0).
_BFLOAT16_CAPABILITY: Final = (8, 0)
# Xids that a user's program causes and a healthy GPU survives; the same as NVIDIA's k8s-device-plugin leaves out.
APPLICATION_XIDS: Final = frozenset({13, 31, 43, 45, 68, 109})
# What one look takes in at most: a GPU that spits errors must not hold up the report.
XIDS_PER_LOOK: Final = 100


def gpus(*, own_pids: Collection[int], ailments: Mapping[str, str], nvml: Any = pynvml) -> tuple[FoundDevice, ...]:
    """Every GPU or MIG slice; none where there is no driver.

    Args:
        own_pids: processes whose memory is ours, not a stranger's.
        ailments: GPU uuid -> what `XidWatch` has heard.
        nvml: the library, or something that answers like it.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        count = nvml.nvmlDeviceGetCount()
        return tuple(device for index in range(count) for device in _gpu(nvml, index, own_pids, ailments))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, own_pids: Collection[int], ailments: Mapping[str, str]) -> list[FoundDevice]:
    """The GPU as one device, or its MIG slices where it is cut into some; nothing when it fell off the bus.

    A device that is registered and no longer found is reported unhealthy (shared/fleet/workers.py).
    """
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        ailment = ailments.get(_text(nvml.nvmlDeviceGetUUID(handle))) or _memory_ailment(nvml, handle)
        bfloat16 = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) >= _BFLOAT16_CAPABILITY
        return [
            _device(
                nvml,
                one,
                name=_text(nvml.nvmlDeviceGetName(handle)),
                ailment=ailment,
                bfloat16=bfloat16,
                own_pids=own_pids,
            )
            for one in _mig_slices(nvml, handle) or [handle]
        ]
    except nvml.NVMLError as error:
        log.warning("device.unreadable", index=index, error=str(error)[:200])
        return []


def _device(
    nvml: Any, handle: Any, *, name: str, ailment: str | None, bfloat16: bool, own_pids: Collection[int]
) -> FoundDevice:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
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
        total_bytes=int(memory.total),
        # What our own trainer holds is free once it has ended; the row is read when it has, before the next look.
        free_bytes=min(int(memory.total), int(memory.free) + ours),
        foreign_bytes=sum(held.values()) - ours,
        ailment=ailment,
        bfloat16=bfloat16,
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


def _memory_ailment(nvml: Any, handle: Any) -> str | None:
    """An uncorrected memory error since boot, a page that waits to be retired, a row remapping that failed.

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
    return "a row remapping failed; replace the GPU" if remapped[3] else None


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
