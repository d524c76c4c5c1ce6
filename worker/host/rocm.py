"""AMD GPUs as amdsmi shows them, on hosts that have it: it comes with ROCm and is not among our dependencies.

Written against AMD's API reference (rocm.docs.amd.com/projects/amdsmi) and tested with a fake; no AMD GPU was at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import Any, Final

import structlog

from worker.host.found_device import FoundDevice

log = structlog.get_logger()

MIB: Final = 1 << 20


def load_amdsmi() -> Any:
    """The library; None if it is not installed or has no driver under it."""
    try:
        return importlib.import_module("amdsmi")
    except (ImportError, OSError, KeyError):  # its import loads the driver's library, and reads ROCM_PATH
        return None


def gpus(*, own_pids: Collection[int], load: Callable[[], Any] = load_amdsmi) -> tuple[FoundDevice, ...]:
    """Every AMD GPU; none where ROCm is not there."""
    smi = load()
    if smi is None:
        return ()
    try:
        smi.amdsmi_init()
    except smi.AmdSmiException:
        return ()
    try:
        return tuple(device for handle in smi.amdsmi_get_processor_handles() for device in _gpu(smi, handle, own_pids))
    finally:
        smi.amdsmi_shut_down()


def _gpu(smi: Any, handle: Any, own_pids: Collection[int]) -> list[FoundDevice]:
    try:
        asic, memory = smi.amdsmi_get_gpu_asic_info(handle), smi.amdsmi_get_gpu_vram_usage(handle)
        total, used = int(memory["vram_total"]) * MIB, int(memory["vram_used"]) * MIB
        held = {
            process["pid"]: int(process["memory_usage"]["vram_mem"])
            for process in smi.amdsmi_get_gpu_process_list(handle)
        }
        errors = smi.amdsmi_get_gpu_total_ecc_count(handle)["uncorrectable_count"]
    except smi.AmdSmiException as error:
        log.warning("device.unreadable", error=str(error)[:200])
        return []
    ours = sum(held[pid] for pid in held if pid in own_pids)
    return [
        FoundDevice(
            # As ROCR_VISIBLE_DEVICES wants it: GPU- and the 16 hexadecimal digits of the unique id.
            uuid=f"GPU-{int(asic['asic_serial'], 16):016x}",
            kind="rocm",
            name=asic["market_name"],
            total_bytes=total,
            free_bytes=min(total, total - used + ours),
            foreign_bytes=sum(held.values()) - ours,
            bfloat16=True,  # every GPU that today's ROCm supports has it (CDNA, RDNA 3)
            ailment=f"{errors} uncorrectable ECC errors; reset the GPU" if errors else None,
        )
    ]
