"""A device is tried by the trainer's own program before the first job, and one that fails says what mends it.

The program runs for real on the processor. What only CUDA shows is tested with reports as they would be, and with a
torch that answers as the source does.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.contract.probe_report import ProbeReport, ProbeSpec
from shared.settings import Settings
from tests.patience import patience
from worker.host import probing
from worker.host.found_device import FoundDevice
from worker.host.probing import AGAIN_SECONDS, TOO_FULL, UNTRIED, Outcome, Probes, try_device
from worker.host.remedies import Driver, ailment, build_for, summary
from worker.train import probe as program
from worker.train import rates as timing
from worker.train.probe import Trial, runs_on

GIB = 1 << 30
CPU = FoundDevice("cpu", "cpu", "CPU", GIB, GIB, 0, bfloat16=False)
GPU = FoundDevice("GPU-a", "cuda", "NVIDIA A100", 80 * GIB, 79 * GIB, 0, bfloat16=True)
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
BUILT = ProbeReport(torch="2.13.0+cu130", cuda="13.0", architectures=CU130, capability=(8, 0))


def test_the_program_passes_on_this_processor(settings: Settings) -> None:
    outcome = try_device(CPU, settings=settings, uid=None, driver=None)

    assert outcome.ailment is None
    assert outcome.summary.startswith(f"PyTorch {torch.__version__}")
    assert outcome.rates is not None, "its products are timed; which are faster is this machine's affair"
    assert list((settings.home / "work").iterdir()) == [], "its folder is removed again"


def test_a_gpu_that_this_pytorch_is_not_built_for_is_ailing(settings: Settings) -> None:
    """As on a GPU host with a CPU wheel: for real, because that is what is installed here."""
    outcome = try_device(GPU, settings=settings, uid=None, driver=Driver("580.65.06", (13, 0)))

    assert outcome.ailment is not None
    assert "is not built for such devices: `make setup TORCH=cu130`" in outcome.ailment


def test_a_program_that_crashes_or_says_nothing_makes_its_device_ailing(settings: Settings, tmp_path: Path) -> None:
    crashed = try_device(GPU, settings=settings, uid=None, driver=None, module="no_such_program")

    assert crashed.ailment is not None
    assert "exit code 1" in crashed.ailment
    assert "No module named no_such_program" in crashed.ailment


def test_the_other_children_of_a_worker_outlive_a_probe(settings: Settings) -> None:
    """A worker's first process probes; its children are at work on other devices."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as at_work:
        try_device(GPU, settings=settings, uid=None, driver=None, module="no_such_program")

        assert at_work.poll() is None
        at_work.kill()


def test_a_program_that_hangs_is_ended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.0)

    assert "did not end" in (try_device(GPU, settings=settings, uid=None, driver=None).ailment or "")


@pytest.mark.parametrize(
    ("report", "driver", "sentence"),
    [
        (
            BUILT.model_copy(update={"failed": "device", "words": "The NVIDIA driver on your system is too old"}),
            Driver("550.54.15", (12, 4)),
            "driver 550 is too old for CUDA 13.0: install 580 or `make setup TORCH=cu126`",
        ),
        (
            BUILT.model_copy(update={"failed": "device", "words": "The NVIDIA driver on your system is too old"}),
            Driver("470.82.01", (11, 4)),
            "driver 470 is too old for CUDA 13.0: install 580",
        ),
        (
            ProbeReport(torch="2.13.0+cu126", cuda="12.6", failed="device", words="too old"),
            Driver("520.61.05", (11, 8)),
            "driver 520 is too old for CUDA 12.6: install 525",
        ),
        (
            BUILT.model_copy(update={"failed": "device", "words": "CUDA unknown error"}),
            Driver("580.65.06", (13, 0)),
            "PyTorch 2.13.0+cu130 cannot open it: CUDA unknown error",
        ),
        (
            BUILT.model_copy(update={"failed": "architecture", "capability": (7, 0)}),
            Driver("580.65.06", (13, 0)),
            "compute capability 7.0 is not in PyTorch 2.13.0+cu130 (sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, "
            "compute_120): `make setup TORCH=cu126`",
        ),
        (
            ProbeReport(
                torch="2.13.0+cu126", cuda="12.6", architectures=["sm_90"], capability=(12, 0), failed="architecture"
            ),
            Driver("580.65.06", (13, 0)),
            "compute capability 12.0 is not in PyTorch 2.13.0+cu126 (sm_90): `make setup TORCH=cu130`",
        ),
        (BUILT.model_copy(update={"failed": "compiler"}), None, "install gcc"),
        (
            BUILT.model_copy(update={"failed": "header", "words": "no /usr/include/python3.11/Python.h"}),
            None,
            f"install python{sys.version_info.major}.{sys.version_info.minor}-dev",
        ),
        (
            BUILT.model_copy(update={"failed": "access", "words": "user 64998 may not open /dev/nvidiactl"}),
            None,
            "user 64998 may not open /dev/nvidiactl: give that user",
        ),
    ],
)
def test_each_failure_says_what_mends_it(report: ProbeReport, driver: Driver | None, sentence: str) -> None:
    told = ailment(report, driver=driver)

    assert told is not None
    assert told == sentence or sentence in told


def test_a_driver_has_the_build_that_it_can_run() -> None:
    assert [build_for(driver) for driver in (None, Driver("580.1", (13, 0)), Driver("535.1", (12, 2)))] == [
        "cu130",
        "cu130",
        "cu126",
    ]
    assert summary(BUILT, driver=Driver("580.65.06", (13, 0))) == (
        "PyTorch 2.13.0+cu130, driver 580.65.06, compute capability 8.0, bfloat16 no"
    )


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), CU130, True),
        ((8, 9), CU130, True),  # machine code of sm_86
        ((7, 0), CU130, False),
        ((12, 1), CU130, True),  # GB10
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90a", "sm_90"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_90"], True),
        ((8, 0), ["sm_86"], False),
        ((8, 0), [], False),
    ],
)
def test_machine_code_runs_on_its_major_number_and_portable_code_on_every_later_one(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert runs_on(capability, architectures) is runs


class FakeCuda:
    """torch.cuda for one GPU; `init` raises what torch raises for an old driver."""

    def __init__(self, *, capability: tuple[int, int] = (8, 0), error: str = "") -> None:
        self.capability, self.error = capability, error

    def init(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def device_count(self) -> int:
        return 1

    def get_arch_list(self) -> list[str]:
        return CU130

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProbeReport]:
    """A run of every stage of CUDA, with the processor in the GPU's place."""

    def run(fake: FakeCuda, **replaced: Any) -> ProbeReport:
        for name in ("init", "device_count", "get_arch_list", "get_device_capability"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        for name, value in replaced.items():
            monkeypatch.setattr(program, name, value)
        attempt = Trial(ProbeSpec(kind="cuda"))
        attempt.device = "cpu"
        attempt.report.cuda = "13.0"
        return attempt.run()

    kernel = SimpleNamespace(count=lambda n, *, device: torch.arange(n, dtype=torch.int32, device=device))
    monkeypatch.setitem(sys.modules, "worker.train.triton_kernel", kernel)
    monkeypatch.setattr(program, "header", lambda: None)
    monkeypatch.setattr(program.shutil, "which", lambda name: f"/usr/bin/{name}")
    return run


def test_a_sound_gpu_passes_every_stage_in_order(cuda: Callable[..., ProbeReport]) -> None:
    report = cuda(FakeCuda())

    assert report.failed is None, report.words
    assert report.passed == [
        *("access", "build", "device", "architecture", "product", "bfloat16", "compiler", "header", "triton"),
        "quantization",
    ]
    assert (report.capability, report.bfloat16) == ((8, 0), True)


def test_an_older_gpu_is_not_asked_for_bfloat16(cuda: Callable[..., ProbeReport]) -> None:
    report = cuda(FakeCuda(capability=(7, 5)))

    assert (report.failed, report.bfloat16) == (None, False)


def test_the_first_stage_that_fails_ends_the_probe_with_torchs_words(cuda: Callable[..., ProbeReport]) -> None:
    words = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"

    report = cuda(FakeCuda(error=words))

    assert (report.failed, report.words, report.passed) == ("device", words, ["access", "build"])


def test_no_compiler_and_no_header_are_found_before_triton_needs_them(
    cuda: Callable[..., ProbeReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda _name: None)
    assert cuda(FakeCuda()).failed == "compiler"

    monkeypatch.setattr(program.shutil, "which", lambda name: name)
    monkeypatch.setattr(program.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(program.StageFailed, match=r"Python\.h"):
        HEADER()


HEADER = program.header  # before a fixture replaces it


def test_a_kernel_with_wrong_numbers_is_no_pass(
    cuda: Callable[..., ProbeReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(count=lambda n, *, device: torch.zeros(n, dtype=torch.int32))
    monkeypatch.setitem(sys.modules, "worker.train.triton_kernel", wrong)

    assert cuda(FakeCuda()).failed == "triton"


def test_a_gpu_that_others_fill_is_not_tried_until_there_is_room(settings: Settings) -> None:
    tried, done = list[str](), threading.Event()

    def probe(device: FoundDevice) -> Outcome:
        tried.append(device.uuid)
        return Outcome(None, "sound")

    probes = Probes(settings, done=done.set, probe=probe)
    (full,) = probes.judged([replace(GPU, free_bytes=GIB)])
    before = list(tried)
    probes.judged([GPU])
    assert done.wait(patience(20))
    (later,) = probes.judged([replace(GPU, free_bytes=GIB)])

    assert (full.ailment, before, tried) == (TOO_FULL, [], ["GPU-a"])
    assert later.healthy, "what was found once holds while the device is in use"


class Ticking:
    """A clock for which a product of each type takes its own time."""

    def __init__(self, seconds: dict[torch.dtype, list[float]]) -> None:
        self.now, self._seconds = 0.0, {dtype: iter(times) for dtype, times in seconds.items()}

    def __call__(self) -> float:
        return self.now

    def product(self, dtype: torch.dtype) -> Callable[[], object]:
        def work() -> object:
            self.now += next(self._seconds[dtype])
            return None

        return work


def test_the_best_round_of_each_type_counts_and_the_first_is_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking({torch.float32: [9.0, 0.4, 0.2, 0.3], torch.bfloat16: [9.0, 0.1, 0.5, 0.5]})
    monkeypatch.setattr(timing, "_product", clock.product)

    found = timing.rates(clock=clock, seconds=1.0)

    operations = 4 * timing.TOKENS * timing.WIDE * timing.WITHIN / 1e9
    assert found == pytest.approx({"float32": operations / 0.2, "bfloat16": operations / 0.1})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_gpu_is_ailing_until_it_was_tried_and_tried_again_only_while_it_fails(settings: Settings) -> None:
    done, clock, tried, begun = threading.Semaphore(0), Clock(), list[str](), threading.Event()
    answers = {"GPU-a": Outcome(None, "sound"), "GPU-b": Outcome("no gcc", "")}

    def probe(device: FoundDevice) -> Outcome:
        assert begun.wait(patience(20))
        tried.append(device.uuid)
        return answers[device.uuid]

    def finish(times: int) -> None:
        for _ in range(times):
            assert done.acquire(timeout=patience(20))
        assert probes._thread is not None
        probes._thread.join(patience(20))

    probes = Probes(settings, done=done.release, probe=probe, clock=clock)
    devices = (CPU, GPU, replace(GPU, uuid="GPU-b"))

    first = probes.judged(devices)
    begun.set()
    finish(2)
    second = probes.judged(devices)
    clock.now = AGAIN_SECONDS + 1
    answers["GPU-b"] = Outcome(None, "mended")
    probes.judged(devices)
    finish(1)
    third = probes.judged(devices)

    assert [device.ailment for device in first] == [None, UNTRIED, UNTRIED]
    assert [device.ailment for device in second] == [None, None, "no gcc"]
    assert [device.healthy for device in third] == [True, True, True]
    assert (third[1].probed, third[2].probed) == ("sound", "mended")
    assert tried == ["GPU-a", "GPU-b", "GPU-b"]
