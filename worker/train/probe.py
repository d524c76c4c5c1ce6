"""Tries one device in the trainer's own environment: `python -m worker.train.probe SPEC OUT`.

Writes `OUT/probe.json` (`ProbeReport`) and exits 0, whatever it finds; only a crash leaves no report. The stages are
the foundations of a first training step: if a host lacks one, this is known before its first job. Without CUDA the
stages of CUDA are left out. The kernel of the stage "triton" has not been run on a GPU by the project's tests.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from shared.contract.passes import device_kind
from shared.contract.probe_report import ProbeReport, ProbeSpec, Stage
from worker.train import cpu_kernels
from worker.train.rates import rates

NVIDIA_CONTROL: Final = Path("/dev/nvidiactl")
SIZE: Final = 64
# What 4 bits lose of a number between -1 and 1: half the widest gap between two of NF4's values (QLoRA, appendix E).
NF4_GAP: Final = 0.16
_ARCHITECTURE: Final = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


class StageFailed(Exception):
    """A stage found what keeps trainers from this device."""


class Trial:
    """One probe of one device."""

    def __init__(self, spec: ProbeSpec, *, out: Path | None = None) -> None:
        self.out = out
        self.kind, self.compiler_named = spec.kind, spec.compiler
        self.device = device_kind(spec.kind)
        self.report = ProbeReport(torch=torch.__version__, cuda=torch.version.cuda or "", hip=torch.version.hip or "")

    def run(self) -> ProbeReport:
        for name, stage in self._stages():
            try:
                stage()
            except Exception as error:  # noqa: BLE001 -- whatever the libraries raise is what we want to know
                traceback.print_exc()
                self.report.failed = name
                self.report.words = _last_line(error)
                break
            self.report.passed.append(name)
        return self.report

    def _stages(self) -> Sequence[tuple[Stage, Callable[[], None]]]:
        everywhere: list[tuple[Stage, Callable[[], None]]] = [
            ("product", self.product),
            ("bfloat16", self.in_bfloat16),
        ]
        architecture: list[tuple[Stage, Callable[[], None]]] = [("architecture", self.architecture)]
        last: tuple[Stage, Callable[[], None]] = ("quantization", self.quantization)
        if self.kind == "cpu":
            return [*everywhere, last, ("rates", self.rates)]
        return [
            ("access", self.access),
            ("build", self.build),
            ("device", self.find),
            *(architecture if self.kind == "cuda" else []),
            *everywhere,
            ("compiler", self.compiler),
            ("header", header),
            ("triton", self.triton),
            last,
        ]

    def access(self) -> None:
        if NVIDIA_CONTROL.exists() and not os.access(NVIDIA_CONTROL, os.R_OK | os.W_OK):
            raise StageFailed(f"user {os.geteuid()} may not open {NVIDIA_CONTROL}")

    def build(self) -> None:
        if not (self.report.cuda if self.kind == "cuda" else self.report.hip):
            raise StageFailed(f"{self.report.torch} is not built for it")

    def find(self) -> None:
        torch.cuda.init()
        if torch.cuda.device_count() == 0:
            raise StageFailed("PyTorch sees no device")

    def architecture(self) -> None:
        self.report.architectures = list(torch.cuda.get_arch_list())
        major, minor = torch.cuda.get_device_capability(0)
        self.report.capability = major, minor
        if not runs_on((major, minor), self.report.architectures):
            raise StageFailed(f"no machine code for sm_{major}{minor}")

    def product(self) -> None:
        multiply(self.device, torch.float32)

    def in_bfloat16(self) -> None:
        capability = self.report.capability
        if capability is None or capability >= (8, 0):  # older GPUs train in float16
            multiply(self.device, torch.bfloat16)
            self.report.bfloat16 = True

    def compiler(self) -> None:
        """As triton/runtime/build.py looks for one: CC, then gcc, then clang."""
        if not any(shutil.which(name) for name in (self.compiler_named, "gcc", "clang") if name):
            raise StageFailed("no C compiler")

    def triton(self) -> None:
        count = import_module("worker.train.triton_kernel").count
        if not torch.equal(count(1000, device=self.device).cpu(), torch.arange(1000, dtype=torch.int32)):
            raise StageFailed("a kernel computed wrong numbers")

    def quantization(self) -> None:
        functional = import_module("bitsandbytes.functional")
        weights = torch.linspace(-1, 1, SIZE, device=self.device).repeat(SIZE, 1)
        packed, state = functional.quantize_4bit(weights, blocksize=SIZE, quant_type="nf4")
        lost = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
        if not lost < NF4_GAP:
            raise StageFailed(f"4-bit weights come back {lost:.2f} off")

    def rates(self) -> None:
        self.report.rates = rates()
        cpu_kernels.load(self.out)  # compiled here, it is there for every attempt


def multiply(device: str, dtype: torch.dtype) -> None:
    """A product and its backward in small whole numbers, which every arithmetic has exactly. Raises StageFailed."""
    grid = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)) % 3 - 1
    left = grid.to(device, dtype).requires_grad_()
    product = left @ left.detach().T
    product.sum().backward()
    exact = grid.double() @ grid.double().T
    columns = grid.double().sum(0).expand(SIZE, SIZE)
    if left.grad is None or not (_same(product, exact) and _same(left.grad, columns)):
        raise StageFailed(f"a product in {dtype} came out wrong")


def _same(computed: torch.Tensor, exact: torch.Tensor) -> bool:
    return torch.equal(computed.detach().cpu().double(), exact)


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build has code for a device.

    Machine code (`sm_`) runs on the same major number from its minor one on; `a` binds it to one device exactly, `f` to
    a family. The portable code (`compute_`) is compiled for any later device (CUDA programming guide, binary and PTX
    compatibility).
    """
    for name in architectures:
        if parts := _ARCHITECTURE.fullmatch(name):
            code, built, bound = parts[1], (int(parts[2]), int(parts[3])), parts[4]
            if built == capability or (bound != "a" and code == "compute" and built <= capability):
                return True
            if bound != "a" and built[0] == capability[0] and built[1] <= capability[1]:
                return True
    return False


def header() -> None:
    """Raises StageFailed where Python.h of this interpreter is missing."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise StageFailed(f"no {folder / 'Python.h'}")


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if not isinstance(error, RuntimeError) else 0][:1000]


def main(spec_file: Path, out: Path) -> int:
    spec = ProbeSpec.model_validate_json(spec_file.read_bytes())
    report = Trial(spec, out=out).run()
    (out / "probe.json").write_text(report.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
