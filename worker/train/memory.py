"""Memory: how much this process may use, how much it has used, and the signs of libraries that it was too little."""

from __future__ import annotations

import errno
import resource

import psutil
import torch

from shared.contract.spec import AttemptSpec


def limit_memory(spec: AttemptSpec) -> None:
    """Make allocation fail past the attempt's limit, so that it ends as out of memory and not by the kernel's axe."""
    if spec.memory_limit_bytes is None:
        return
    if spec.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
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


def peak_memory_bytes(spec: AttemptSpec) -> int:
    """Most memory ever held: of the device for CUDA, resident for the CPU."""
    return int(torch.cuda.max_memory_allocated()) if spec.device == "cuda" else peak_host_memory_bytes()


def peak_host_memory_bytes() -> int:
    """Most memory that this process was ever resident with."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


# What torch, oneDNN and the C++ runtime say when the host has no memory left; none of them has a class of its own.
_HOST_OOM_PHRASES = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory"),
    *("std::bad_alloc", "could not create a memory object"),
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
