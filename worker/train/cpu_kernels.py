"""Builds and loads the kernels of `cpu_kernels.c`: norms, rotary, SwiGLU, attention and the loss, one pass each.

torch's operators for them are many, and each passes over all numbers once more. The host's C compiler builds a library
of some kilobytes, once: what is left below OUT the worker keeps (`PROCESSOR_KERNELS`). Where there is no compiler, or
the library fails its try, torch's operators do the work, and the log says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from shared.contract.compiled import PROCESSOR_KERNELS

SOURCE: Final = Path(__file__).with_name("cpu_kernels.c")
_INCLUDED: Final = Path(__file__).with_name("cpu_attention.c")
# No -ffast-math: it would have every thread of the process flush small numbers to zero. Threads are torch's own: its
# libgomp is loaded, and the dynamic linker takes no second one of that name.
FLAGS: Final = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
SUFFIX: Final[dict[torch.dtype, str]] = {torch.bfloat16: "bf16", torch.float32: "f32"}
BUILD_SECONDS: Final = 120.0
_CPUINFO: Final = Path("/proc/cpuinfo")


class Unfit(Exception):
    """There is no library, or it does not compute what it should."""


_tried: list[ctypes.CDLL | None] = []  # one process asks once


def load(out: Path | None = None) -> ctypes.CDLL | None:
    """The library, tried; None where it cannot be used.

    Args:
        out: where what was compiled is looked for and left; only the first call looks.
    """
    if not _tried:
        _tried.append(_load(out))
    return _tried[0]


def _load(out: Path | None) -> ctypes.CDLL | None:
    try:
        if out is not None:
            library = ctypes.CDLL(str(_compiled(out / PROCESSOR_KERNELS)))
        else:
            with tempfile.TemporaryDirectory(prefix="kernels-") as folder:  # what is loaded outlives its file
                library = ctypes.CDLL(str(_compiled(Path(folder))))
        library.attention_scratch.restype = ctypes.c_int64
        _check(library)
    except (Unfit, OSError, subprocess.SubprocessError) as error:
        print(f"torch's operators compute norms, rotary, SwiGLU and softmax: {error}", flush=True)
        return None
    return library


def _compiled(folder: Path) -> Path:
    """The library's file, compiled unless it was. Raises Unfit, OSError."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Unfit("there is no C compiler (gcc)")
    library = folder / f"{_key(compiler)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_name(f".{os.getpid()}-{library.name}")
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(unfinished), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    if done.returncode:
        raise Unfit(f"{Path(compiler).name} does not compile the kernels: {done.stderr.strip()[-300:]}")
    unfinished.replace(library)  # ranks compile at the same time
    return library


def _key(compiler: str) -> str:
    """Source, compiler and what the processor can: a folder may be shared by unlike hosts."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = (file.read_text(encoding="utf-8") for file in (SOURCE, _INCLUDED))
    what = "\n".join((*sources, compiler, *FLAGS, able))
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _check(library: ctypes.CDLL) -> None:
    """Try what everything stands on: the threads are torch's, and both types come out right. Raises Unfit."""
    if library.threads() != torch.get_num_threads():
        raise Unfit("the compiler's threads are not torch's")
    numbers = torch.Generator().manual_seed(0)  # a try must not move the run's own random numbers
    wide = torch.randn(2, 5, 40, generator=numbers) * 3
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        gate, up = wide.to(dtype)
        expected = torch.nn.functional.silu(gate.double()) * up.double()
        answer = torch.empty_like(gate)
        call(library, "swiglu", dtype, gate, up, answer, *gate.shape, gate.shape[1])
        if not torch.allclose(answer.double(), expected, rtol=tolerance, atol=tolerance):
            raise Unfit("the compiled kernels give other numbers")


def call(library: ctypes.CDLL, name: str, dtype: torch.dtype, *given: torch.Tensor | float | None) -> None:
    """Call a kernel for rows of `dtype`. Tensors must be laid out as the kernel reads them: nothing is checked here."""
    getattr(library, f"{name}_{SUFFIX[dtype]}")(*map(_passed, given))


def _passed(given: torch.Tensor | float | None) -> Any:
    if isinstance(given, torch.Tensor):
        return ctypes.c_void_p(given.data_ptr())
    if given is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(given) if isinstance(given, float) else ctypes.c_int64(given)
