"""Which arithmetic a processor's jobs get follows from what it was measured to multiply, once, and stays so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.contract.probe_report import ProbeReport
from shared.settings import Settings
from tests.patience import patience
from worker.host import processor_rates
from worker.host.devices import cpu
from worker.host.found_device import FoundDevice
from worker.host.probing import Outcome, Probes
from worker.host.processor_rates import FILE, ProductRates, keep, known, this_machine
from worker.host.remedies import summary

FAST = ProductRates(float32=100.0, bfloat16=200.0)
EMULATED = ProductRates(float32=80.0, bfloat16=12.0)
WITH_FLAGS = "model name\t: A processor\nflags\t: avx2 avx512_bf16\n"
WITHOUT_FLAGS = "model name\t: A processor\nflags\t: avx2 fma\n"


@pytest.fixture
def measuring(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)  # the suite itself may run as on a slower machine
    settings.home.mkdir(parents=True)
    return settings.model_copy(update={"cpu_probe": True, "cpu_instructions": ""})


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "cpuinfo").write_text(text)
        return tmp_path / "cpuinfo"

    return write


def computes_bfloat16(settings: Settings, cpuinfo: Path, rates: ProductRates | None) -> bool:
    """As jobs are settled for it, once this was measured."""
    (device,) = cpu(settings, cpuinfo=cpuinfo)
    if rates is not None:
        keep(settings, this_machine(threads=device.cores or 1, cpuinfo=cpuinfo), rates)
        (device,) = cpu(settings, cpuinfo=cpuinfo)
        assert device.probed == f"measured: {rates}"
    return device.bfloat16


@pytest.mark.parametrize(
    ("text", "rates", "bfloat16"),
    [
        pytest.param(WITH_FLAGS, EMULATED, False, id="flags that no library uses"),
        pytest.param(WITHOUT_FLAGS, FAST, True, id="no flag, and fast all the same"),
        pytest.param(WITH_FLAGS, FAST, True, id="both"),
        pytest.param(WITH_FLAGS, None, True, id="not measured yet: flags"),
        pytest.param(WITHOUT_FLAGS, None, False, id="not measured yet: no flags"),
    ],
)
def test_what_was_measured_outweighs_the_flags(
    measuring: Settings, cpuinfo: Callable[[str], Path], text: str, rates: ProductRates | None, bfloat16: bool
) -> None:
    assert computes_bfloat16(measuring, cpuinfo(text), rates) is bfloat16


@pytest.mark.parametrize(("gain", "bfloat16"), [(0.15, False), (1.0, False), (1.29, False), (1.31, True), (2.0, True)])
def test_bfloat16_has_to_be_clearly_faster(gain: float, bfloat16: bool) -> None:
    assert ProductRates(float32=100.0, bfloat16=100.0 * gain).bfloat16_is_clearly_faster is bfloat16


def test_the_slots_of_a_processor_have_what_was_measured_for_one(measuring: Settings) -> None:
    shared = measuring.model_copy(update={"cpu_slots": 2, "cpu_threads": 4})
    keep(shared, this_machine(threads=2), EMULATED)

    assert [device.bfloat16 for device in cpu(shared)] == [False, False]


@pytest.mark.parametrize("change", ["threads", "processor", "variables", "setting"])
def test_what_was_measured_elsewhere_or_otherwise_does_not_count(
    measuring: Settings, cpuinfo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    file = cpuinfo(WITH_FLAGS)
    keep(measuring, this_machine(threads=2, cpuinfo=file), FAST)
    assert known(measuring, this_machine(threads=2, cpuinfo=file)) == FAST
    now, threads = measuring, 2
    match change:
        case "threads":
            threads = 4
        case "processor":
            file = cpuinfo(WITH_FLAGS.replace("A processor", "Another one"))
        case "variables":
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        case "setting":
            now = measuring.model_copy(update={"cpu_probe": False})

    assert known(now, this_machine(threads=threads, cpuinfo=file)) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"machine": {}, "rates": {"float32": 0, "bfloat16": -1}}'])
def test_a_file_that_says_nothing_is_measured_anew(measuring: Settings, content: bytes) -> None:
    (measuring.home / FILE).write_bytes(content)

    assert known(measuring, this_machine(threads=1)) is None


class Trials:
    """A probe in the real one's place: it finds these rates, and counts how often it was asked."""

    def __init__(self, settings: Settings, rates: ProductRates | None) -> None:
        self.asked = 0
        self._rates = rates
        self._done = threading.Semaphore(0)
        self.probes = Probes(settings, done=self._done.release, probe=self._probe)

    def _probe(self, device: FoundDevice) -> Outcome:
        self.asked += 1
        return Outcome(None, "sound", rates=self._rates)

    def look(self, settings: Settings, *, asks: bool) -> tuple[FoundDevice, ...]:
        """One report, and the probe that it begins."""
        judged = self.probes.judged(cpu(settings))
        if asks:
            assert self._done.acquire(timeout=patience(20))
            assert self.probes._thread is not None
            self.probes._thread.join(patience(20))
        return judged


@pytest.fixture
def two_slots(measuring: Settings) -> Settings:
    return measuring.model_copy(update={"cpu_slots": 2, "cpu_threads": 2})


@pytest.mark.parametrize("rates", [EMULATED, FAST])
def test_a_worker_times_its_processor_once_and_takes_jobs_meanwhile(two_slots: Settings, rates: ProductRates) -> None:
    trials = Trials(two_slots, rates)

    before = trials.look(two_slots, asks=True)
    after = trials.look(two_slots, asks=False)
    again = Trials(two_slots, rates)
    again.look(two_slots, asks=False)

    assert [device.healthy for device in before] == [True, True]
    assert {device.bfloat16 for device in after} == {rates.bfloat16_is_clearly_faster}
    assert (trials.asked, again.asked) == (1, 0), "the next worker of this home finds it kept"


def test_a_probe_that_finds_no_rates_is_not_repeated_by_every_report(two_slots: Settings) -> None:
    trials = Trials(two_slots, None)

    trials.look(two_slots, asks=True)
    devices = trials.look(two_slots, asks=False)

    assert trials.asked == 1
    assert {device.probed for device in devices} == {None}


def test_rates_that_cannot_be_kept_leave_the_choice_to_the_flags(
    two_slots: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(processor_rates, "keep", full)
    trials = Trials(two_slots, EMULATED)
    flagged = [device.bfloat16 for device in cpu(two_slots)]

    trials.look(two_slots, asks=True)

    assert [device.bfloat16 for device in trials.look(two_slots, asks=False)] == flagged
    assert trials.asked == 1


def test_no_processor_is_timed_where_the_operator_leaves_it_to_the_flags(settings: Settings) -> None:
    assert settings.cpu_probe is False  # of every test (tests/conftest.py)
    trials = Trials(settings, FAST)

    trials.look(settings, asks=False)

    assert trials.asked == 0


def test_people_read_what_was_measured() -> None:
    report = ProbeReport(torch="2.13.0", bfloat16=True, rates={"float32": 80.4, "bfloat16": 160.2})

    assert summary(report, driver=None) == "PyTorch 2.13.0, bfloat16 yes, float32 80 GFLOP/s, bfloat16 160 GFLOP/s"
