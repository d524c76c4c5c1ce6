"""Memory: how much this process may use, how much it has used, and the signs of libraries that it was too little."""

from __future__ import annotations

import errno
import mmap
import resource
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch

from shared.contract.spec import AttemptSpec


def limit_memory(spec: AttemptSpec) -> None:
    """Make allocation fail past the attempt's limit, so that it ends as out of memory and not by the kernel's axe."""
    if spec.memory_limit_bytes is None:
        return
    if spec.device == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.memory_limit_bytes / total))
    else:
        limit_host_memory(spec.memory_limit_bytes)


def limit_host_memory(limit: int, *, mapped: int = 0) -> None:
    """Make allocation fail once this process holds `limit` bytes of its own.

    Args:
        mapped: bytes of files that it will map and not write: they count as private, and the kernel can do without.
    """
    # DATA counts private writable memory, which is what tensors are; address space would count mapped files too.
    # But it counts what is reserved and never touched as well, over a gigabyte once the libraries are imported, so
    # the limit bounds what this process may still gain.
    now = psutil.Process().memory_full_info()
    ceiling = now.data + mapped + max(0, limit - now.uss)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


class MemoryReserve:
    """Memory that is held back for the words about its lack: an exhausted process has none left to say so.

    Mapped by itself, so that letting it go gives it back to the kernel, under whose limit the words then find room.
    """

    BYTES: Final = 4 * 2**20

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, self.BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def let_go(self) -> None:
        self._pages.close()


# Driver context and cuBLAS, where the device cannot be asked: `shared.settle.sizing` assumes as much.
CONTEXT_BYTES: Final = 900 * 10**6
# What stands beside torch's memory is context, communicators and modules; more than this is somebody else's.
MOST_BESIDE: Final = 4 * 2**30


def device_bytes_in_use(spec: AttemptSpec, *, cuda: Any = torch.cuda) -> int | None:
    """Bytes of this rank's device that anybody uses, as its driver's own library tells; None where it does not.

    It creates no context: it is asked before anything of ours is there.
    """
    if spec.device == "cpu":
        return None
    try:
        return int(cuda.device_memory_used(torch.distributed.get_node_local_rank(fallback_rank=0)))
    except Exception:  # noqa: BLE001 -- NVML and amdsmi have errors of their own, and slices of a GPU have no index
        return None


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that this process held, in bytes. On a CPU all three are what was resident."""

    allocated: int  # by tensors
    reserved: int  # by torch's allocator, with its gaps
    whole: int  # with what lies beside: context, communicators, kernels


def peak_memory(spec: AttemptSpec, *, before: int | None = None, cuda: Any = torch.cuda) -> Peaks:
    """`before`: `device_bytes_in_use` at the start, which others held."""
    if spec.device == "cpu":
        return Peaks(*[peak_host_memory_bytes()] * 3)
    reserved = int(cuda.max_memory_reserved())
    now = device_bytes_in_use(spec, cuda=cuda)
    beside = None if before is None or now is None else now - before - int(cuda.memory_reserved())
    known = beside is not None and 0 < beside <= MOST_BESIDE
    return Peaks(int(cuda.max_memory_allocated()), reserved, reserved + (beside if beside and known else CONTEXT_BYTES))


def held_memory_bytes(*, cuda: Any = torch.cuda) -> int:
    """What this process holds now: of a GPU what torch's allocator has, with its gaps; else what is resident."""
    return int(cuda.memory_reserved()) if cuda.is_initialized() else int(psutil.Process().memory_info().rss)


def peak_host_memory_bytes() -> int:
    """Most memory that this process was ever resident with."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


# What torch, oneDNN, the C++ runtime and Python (for a thread's stack) say when the host has no memory left; none of
# them has a class of its own.
_HOST_OOM_PHRASES = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory"),
    *("std::bad_alloc", "could not create a memory object", "can't start new thread"),
)
# What CUDA and HIP say of a device, and with them Triton and bitsandbytes; cuBLAS, cuDNN and cuSOLVER; cuSPARSE; NCCL.
_DEVICE_OOM_PHRASES = (
    *("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "hipErrorOutOfMemory"),
    *("_STATUS_ALLOC_FAILED", "_STATUS_INSUFFICIENT_RESOURCES"),
    *("Failed to CUDA calloc", "Failed to CUDA malloc", "Failed to CUDA host alloc"),
)

# The classes that an exhausted memory comes as.
MAY_MEAN_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError)


def out_of_memory_code(error: BaseException) -> str | None:
    """`gpu_oom` or `host_oom` if `error`, or what it was raised from, says that memory ran out; else None."""
    code = _code(error)
    if code is not None or error.__cause__ is None:
        return code
    return out_of_memory_code(error.__cause__)


def _code(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return "gpu_oom"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host_oom"
    if not isinstance(error, RuntimeError):
        return None
    if any(phrase in str(error) for phrase in _HOST_OOM_PHRASES):
        return "host_oom"
    return "gpu_oom" if any(phrase in str(error) for phrase in _DEVICE_OOM_PHRASES) else None
