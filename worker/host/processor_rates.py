"""What this processor multiplies: measured once by a trainer's own program, and kept in the home.

Flags say what a processor can do, not what the libraries at hand do fast. So a probe times one product of a training
step in float32 and in bfloat16 (`worker.train.rates`). Its figures hold for one machine. They are measured anew with
another processor, number of threads or PyTorch, or other variables of its libraries. As long as nothing is known, the
flags decide (`worker/host/devices.py`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.settings import Settings, trainer_environment

# bfloat16 rounds more coarsely, so it has to be clearly faster. Runs of one machine differ by less than this.
CLEARLY_FASTER: Final = 1.3
FILE: Final = "processor.json"
CPUINFO: Final = Path("/proc/cpuinfo")
# Variables of the libraries that multiply: oneDNN, MKL, PyTorch's own kernels, OpenMP.
_ARITHMETIC: Final = ("ONEDNN_", "DNNL_", "MKL_", "ATEN_", "OMP_", "KMP_")


class Machine(BaseModel):
    """What the rates of products hang on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processor: str
    flags: str
    cores: int
    threads: int = Field(description="Of a trainer.")
    torch: str
    variables: dict[str, str] = Field(description="Of the libraries that multiply, as trainers get them.")


class ProductRates(BaseModel):
    """GFLOP/s of a product of a training step, on the threads of one trainer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    float32: float = Field(gt=0)
    bfloat16: float = Field(gt=0)

    @property
    def bfloat16_is_clearly_faster(self) -> bool:
        return self.bfloat16 >= CLEARLY_FASTER * self.float32

    def __str__(self) -> str:
        return f"float32 {self.float32:.0f}, bfloat16 {self.bfloat16:.0f} GFLOP/s"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: Machine
    rates: ProductRates


def this_machine(*, threads: int, cpuinfo: Path = CPUINFO) -> Machine:
    return Machine(
        processor=_line(cpuinfo, "model name", "CPU part"),
        flags=flags(cpuinfo),
        cores=os.cpu_count() or 1,
        threads=threads,
        torch=_torch(),
        variables={
            name: value for name, value in sorted(trainer_environment().items()) if name.startswith(_ARITHMETIC)
        },
    )


@functools.cache  # asked at every heartbeat
def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:  # trainers of the operator's own
        return ""


def flags(cpuinfo: Path = CPUINFO) -> str:
    """What the processor can do, in the kernel's words."""
    return _line(cpuinfo, "flags", "Features")


def known(settings: Settings, machine: Machine) -> ProductRates | None:
    """What was measured on this very machine, if anything was and the setting lets it count."""
    if not settings.cpu_probe:
        return None
    with contextlib.suppress(OSError, ValidationError):  # half a file, or one of another version: measured anew
        kept = _Kept.model_validate_json((settings.home / FILE).read_bytes())
        return kept.rates if kept.machine == machine else None
    return None


def keep(settings: Settings, machine: Machine, rates: ProductRates) -> None:
    """From now on `known`. Raises OSError."""
    file = settings.home / FILE
    draft = file.with_suffix(".new")
    draft.write_text(_Kept(machine=machine, rates=rates).model_dump_json(indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def _line(cpuinfo: Path, *names: str) -> str:
    """The value on the first line with one of these names; empty where there is no such line."""
    if not cpuinfo.exists():
        return ""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
