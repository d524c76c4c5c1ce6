"""Turns the findings of a probe into sentences that say how to mend the device. Pure.

Sources: minimum drivers by CUDA release (CUDA release notes, table 3; a build for 12.x runs on the driver of 12.0 by
minor version compatibility); architectures by build (PyTorch's release notes: the builds for CUDA 12.8 and newer have
none before Turing, the one for 12.6 still has Maxwell to Volta).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

from shared.contract.probe_report import ProbeReport, Stage

# Major version of CUDA -> branch of the Linux driver that its builds need.
DRIVER_OF_CUDA: Final = {11: 450, 12: 525, 13: 580}
NEWEST_BUILD: Final = "cu130"
# For drivers and GPUs that the newest build has left behind.
OLD_BUILD: Final = "cu126"
TURING: Final = (7, 5)


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, such as 550.54.15, and the newest CUDA that it serves."""

    version: str
    cuda: tuple[int, int]

    @property
    def branch(self) -> int:
        return int(self.version.split(".")[0])


def build_for(driver: Driver | None) -> str:
    """What `make setup TORCH=` should be on a host with this driver."""
    return NEWEST_BUILD if driver is None or driver.branch >= DRIVER_OF_CUDA[13] else OLD_BUILD


def ailment(report: ProbeReport, *, driver: Driver | None) -> str | None:
    """Why no job may run there, with what to do; None where every stage passed."""
    if report.failed is None:
        return None
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    words: dict[Stage, str] = {
        "access": f"{report.words}: give that user the file's group, make it mode 0666, or set TUNEPOOL_TRAINER_UID",
        "build": f"this PyTorch ({report.torch}) is not built for such devices: `make setup TORCH={build_for(driver)}`",
        "device": _no_device(report, driver),
        "architecture": _no_code(report),
        "product": f"PyTorch {report.torch} does not compute on it: {report.words}",
        "bfloat16": f"PyTorch {report.torch} does not compute in bfloat16 on it: {report.words}",
        "compiler": "Triton needs a C compiler and finds none: install gcc (`apt-get install gcc libc6-dev`)",
        "header": f"Triton needs Python.h and does not find it: install {python}-dev ({report.words})",
        "triton": f"Triton cannot build or run a kernel: {report.words}",
        "rates": f"its products could not be timed: {report.words}",
        "quantization": f"bitsandbytes does not work on it: {report.words}; `make setup` installs the pinned one",
    }
    return words[report.failed]


def _no_device(report: ProbeReport, driver: Driver | None) -> str:
    built = int(report.cuda.split(".")[0]) if report.cuda else 0
    needed = DRIVER_OF_CUDA.get(built, 0)
    if driver is None or driver.branch >= needed:
        return f"PyTorch {report.torch} cannot open it: {report.words}"
    other = f" or `make setup TORCH={OLD_BUILD}`" if built > 12 and driver.branch >= DRIVER_OF_CUDA[12] else ""
    return f"driver {driver.branch} is too old for CUDA {report.cuda}: install {needed}{other}"


def _no_code(report: ProbeReport) -> str:
    capability = report.capability or (0, 0)
    has = ", ".join(report.architectures) or "none"
    what = f"compute capability {capability[0]}.{capability[1]} is not in PyTorch {report.torch} ({has})"
    build = OLD_BUILD if capability < TURING else NEWEST_BUILD
    return f"{what}: `make setup TORCH={build}`" if _is_other(report, build) else f"{what}; no build of it has it"


def _is_other(report: ProbeReport, build: str) -> bool:
    return f"cu{report.cuda.replace('.', '')}" != build


def summary(report: ProbeReport, *, driver: Driver | None) -> str:
    """A line for people about a device that passed: PyTorch, driver, capability, speed."""
    capability = "" if report.capability is None else f", compute capability {_dotted(report.capability)}"
    runs_on = "" if driver is None else f", driver {driver.version}"
    rates = "".join(f", {name} {rate:.0f} GFLOP/s" for name, rate in report.rates.items())
    return f"PyTorch {report.torch}{runs_on}{capability}, bfloat16 {'yes' if report.bfloat16 else 'no'}{rates}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
