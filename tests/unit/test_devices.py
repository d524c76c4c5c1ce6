"""Devices as drivers show them. The drivers are fakes with the functions and errors of the real libraries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from shared.settings import Settings
from worker.host import nvml as nvidia
from worker.host import rocm
from worker.host.devices import NoSuchDevice, cpu, discover, without_driver
from worker.host.examine import unused
from worker.host.idle_memory import IdleMemory
from worker.host.nvml import XidWatch
from worker.program import launcher
from worker.program.processes import Tag

GIB = 1 << 30


@dataclass
class Gpu:
    uuid: str
    used: int = 0
    processes: dict[int, int] = field(default_factory=dict)
    capability: tuple[int, int] = (8, 0)
    ecc: int = 0
    pending: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    slices: tuple[Gpu, ...] = ()
    lost: bool = False
    unified: bool = False  # its memory is the host's: GB10, Jetson
    silent: int = 0  # the error that questions about health and processes end in
    total: int = 80 * GIB


class FakeNvml:
    """Answers like pynvml 13 for some GPUs; names it lacks are pynvml's own constants and errors."""

    def __init__(self, *gpus: Gpu, driver: bool = True) -> None:
        self.gpus, self.driver = list(gpus), driver
        self.events: list[SimpleNamespace] = []
        self.opened = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:  # noqa: N802 -- the library's names
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        if self.gpus[index].lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> bytes:  # noqa: N802
        return b"NVIDIA A100-SXM4-80GB"

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> list[int]:  # noqa: N802
        return list(gpu.capability)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "550.54.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12040

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:  # noqa: N802
        if gpu.unified:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=gpu.total, free=gpu.total - gpu.used, used=gpu.used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:  # noqa: N802
        if gpu.silent:
            raise pynvml.NVMLError(gpu.silent)
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in gpu.processes.items()]

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:  # noqa: N802
        return (1, 1) if gpu.slices else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:  # noqa: N802
        if index >= len(gpu.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu.slices[index]

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, counter: int) -> int:  # noqa: N802
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        if gpu.ecc < 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.ecc

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: Gpu) -> int:  # noqa: N802
        if gpu.silent:
            raise pynvml.NVMLError(gpu.silent)
        return gpu.pending

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> SimpleNamespace:  # noqa: N802
        if gpu.ecc < 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:  # noqa: N802
        return 301_500

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 66

    def nvmlDeviceGetRemappedRows(self, gpu: Gpu) -> tuple[int, int, int, int]:  # noqa: N802
        return (0, 1, int(gpu.remap_pending), int(gpu.remap_failed))

    def nvmlEventSetCreate(self) -> list[Gpu]:  # noqa: N802
        return []

    def nvmlDeviceRegisterEvents(self, gpu: Gpu, kinds: int, registered: list[Gpu]) -> None:  # noqa: N802
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        registered.append(gpu)

    def nvmlEventSetWait_v2(self, registered: list[Gpu], milliseconds: int) -> SimpleNamespace:  # noqa: N802
        assert milliseconds == 0, "a look must not wait"
        assert registered == self.gpus
        if not self.events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return self.events.pop(0)

    def xid(self, gpu: Gpu, number: int) -> None:
        kind = pynvml.nvmlEventTypeXidCriticalError
        self.events.append(SimpleNamespace(device=gpu, eventType=kind, eventData=number))


def none() -> None:
    return None


def found(nvml: FakeNvml, settings: Settings, **more: Any) -> Any:
    devices = discover(settings, nvml=nvml, load_amdsmi=none, **{"driver_signs": [], **more})
    assert nvml.opened == 0, "the library is closed again"
    return devices


def test_every_gpu_is_found_by_its_uuid_with_what_is_free(settings: Settings) -> None:
    nvml = FakeNvml(Gpu("GPU-a", used=GIB), Gpu("GPU-b", capability=(7, 5)))

    one, two = found(nvml, settings)

    assert (one.uuid, one.kind, one.name) == ("GPU-a", "cuda", "NVIDIA A100-SXM4-80GB")
    assert (one.total_bytes, one.free_bytes, one.foreign_bytes) == (80 * GIB, 79 * GIB, 0)
    assert (one.bfloat16, two.bfloat16) == (True, False)
    assert one.healthy


def test_a_gpu_tells_how_much_it_computes_draws_and_heats_as_far_as_it_can(settings: Settings) -> None:
    whole, short = (discover(settings, nvml=FakeNvml(Gpu("GPU-a", ecc=ecc)))[0] for ecc in (0, -1))

    assert whole.readings == {"utilization": 0.75, "watts": 301.5, "celsius": 66.0}
    assert short.readings == {"watts": 301.5, "celsius": 66.0}


def test_a_strangers_memory_is_foreign_and_our_trainers_is_free_once_it_has_ended(settings: Settings) -> None:
    gpu = Gpu("GPU-a", used=50 * GIB, processes={7: 30 * GIB, 99: 20 * GIB})

    (device,) = found(FakeNvml(gpu), settings, own_pids={7})

    assert device.foreign_bytes == 20 * GIB
    assert device.free_bytes == 60 * GIB


def test_mig_slices_are_devices_of_their_own_and_share_their_gpus_health(settings: Settings) -> None:
    gpu = Gpu("GPU-a", slices=(Gpu("MIG-1", total=10 * GIB), Gpu("MIG-2", total=20 * GIB)), ecc=3)

    devices = found(FakeNvml(gpu, Gpu("GPU-b")), settings)

    assert [(device.uuid, device.total_bytes // GIB, device.healthy) for device in devices] == [
        ("MIG-1", 10, False),
        ("MIG-2", 20, False),
        ("GPU-b", 80, True),
    ]


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (Gpu("a", ecc=2), "2 uncorrected ECC errors"),
        (Gpu("a", pending=1), "retired"),
        (Gpu("a", remap_failed=True), "remapping failed"),
        (Gpu("a", remap_pending=True), "waits to be remapped"),
    ],
)
def test_a_gpu_with_broken_memory_is_unhealthy_and_says_why(settings: Settings, gpu: Gpu, words: str) -> None:
    (device,) = found(FakeNvml(gpu), settings)

    assert not device.healthy
    assert words in device.ailment


def test_a_gpu_without_ecc_is_healthy_and_one_that_fell_off_the_bus_is_not_there(settings: Settings) -> None:
    nvml = FakeNvml(Gpu("GPU-a", ecc=-1), Gpu("GPU-b", lost=True))

    assert [(device.uuid, device.healthy) for device in found(nvml, settings)] == [("GPU-a", True)]


def test_a_critical_xid_makes_its_gpu_unhealthy_for_as_long_as_the_worker_lives(settings: Settings) -> None:
    sound, broken = Gpu("GPU-a"), Gpu("GPU-b")
    nvml = FakeNvml(sound, broken)
    watch = XidWatch(nvml)
    first = watch.look()
    nvml.xid(broken, 79)
    nvml.xid(sound, 13)  # a program's own fault
    nvml.xid(sound, 31)

    heard, again = watch.look(), watch.look()
    devices = discover(settings, nvml=nvml, load_amdsmi=none, ailments=heard)

    assert first == {}
    assert again == heard
    assert [(device.uuid, device.healthy) for device in devices] == [("GPU-a", True), ("GPU-b", False)]
    assert "Xid 79" in heard["GPU-b"]


def test_without_a_driver_there_are_no_xids() -> None:
    assert XidWatch(FakeNvml(driver=False)).look() == {}


def test_a_flood_of_xids_does_not_hold_up_the_report() -> None:
    gpu = Gpu("GPU-a")
    nvml = FakeNvml(gpu)
    watch = XidWatch(nvml)
    for _ in range(1000):
        nvml.xid(gpu, 48)

    watch.look()

    assert len(nvml.events) == 900


@pytest.mark.parametrize("nvml", [FakeNvml(driver=False), FakeNvml(), FakeNvml(Gpu("GPU-a", lost=True))])
def test_a_host_whose_driver_shows_no_gpu_that_works_never_becomes_a_cpu_host(
    nvml: FakeNvml, settings: Settings, tmp_path: Path
) -> None:
    (device,) = found(nvml, settings, driver_signs=[tmp_path])

    assert (device.kind, device.healthy, device.total_bytes) == ("cuda", False, 0)
    assert "TUNEPOOL_DEVICES=cpu" in device.ailment


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_only_a_lost_gpu_is_dropped_not_one_that_cannot_answer(settings: Settings, error: int) -> None:
    gone = Gpu("GPU-b", silent=pynvml.NVML_ERROR_GPU_IS_LOST)

    assert [one.uuid for one in found(FakeNvml(Gpu("GPU-a", silent=error), gone), settings)] == ["GPU-a"]


def test_a_gpu_that_shares_the_hosts_memory_offers_that(settings: Settings) -> None:
    (device,) = found(FakeNvml(Gpu("GPU-a", unified=True, capability=(12, 1))), settings)

    assert device.total_bytes == psutil.virtual_memory().total
    assert (device.kind, device.capability, device.healthy) == ("cuda", 121, True)


def test_the_drivers_version_is_known_where_there_is_one() -> None:
    known = nvidia.driver(FakeNvml(Gpu("GPU-a")))

    assert known is not None
    assert (known.branch, known.cuda) == (550, (12, 4))
    assert nvidia.driver(FakeNvml(driver=False)) is None


def test_a_gpu_in_a_slot_without_a_driver_is_seen_and_told(tmp_path: Path, settings: Settings) -> None:
    for number, (vendor, kind) in enumerate([("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "class").write_text(f"{kind}\n")

    cards = without_driver(tmp_path)

    assert cards == 1
    assert "no driver serves them" in unused(cpu(settings), cards=cards)[0]
    assert unused(found(FakeNvml(Gpu("GPU-a")), settings), cards=cards) == []


@pytest.mark.parametrize("nvml", [FakeNvml(driver=False), FakeNvml()])
def test_without_a_gpu_the_processor_is_the_device(nvml: FakeNvml, settings: Settings) -> None:
    (device,) = found(nvml, settings)

    assert (device.uuid, device.kind) == ("cpu", "cpu")
    assert 0 < device.free_bytes <= device.total_bytes < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("flags", "newest", "bfloat16"),
    [
        ("flags\t: avx2 avx512_bf16", "", True),
        ("flags\t: avx512f amx_bf16", "DEFAULT", True),
        ("flags\t: avx512f amx_bf16", "AVX512_CORE_BF16", True),
        ("Features\t: asimd bf16", "", True),
        ("flags\t: avx2 fma", "", False),
        ("flags\t: avx2 avx512_bf16", "AVX2", False),
        ("flags\t: avx2 avx512_bf16", "avx512_core_vnni", False),
    ],
)
def test_a_processor_computes_in_bfloat16_if_it_can_and_the_operator_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, newest: str, bfloat16: bool
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", newest)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")

    (device,) = cpu(Settings(home=tmp_path), cpuinfo=tmp_path / "cpuinfo")

    assert device.bfloat16 == bfloat16


def test_slots_of_the_processor_share_memory_and_cores(settings: Settings) -> None:
    shared = settings.model_copy(update={"cpu_slots": 2, "cpu_memory_bytes": GIB, "cpu_threads": 5})

    devices = cpu(shared)

    assert [(device.uuid, device.total_bytes, device.cores) for device in devices] == [
        ("cpu-0", GIB // 2, 2),
        ("cpu-1", GIB // 2, 2),
    ]


def test_a_container_offers_what_its_limit_leaves(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB + GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 4}\n")

    (device,) = cpu(settings, cgroup=tmp_path)

    assert device.total_bytes == int(2 * GIB * 0.8)
    assert device.free_bytes == GIB // 2 + GIB // 4


def test_a_worker_may_have_some_of_a_hosts_devices(settings: Settings) -> None:
    nvml = FakeNvml(Gpu("GPU-a"), Gpu("GPU-b"), Gpu("GPU-c"))

    def of(wanted: str) -> list[str]:
        return [device.uuid for device in found(nvml, settings.model_copy(update={"devices": wanted}))]

    assert of("GPU-b") == ["GPU-b"]
    assert of("0, GPU-c") == ["GPU-a", "GPU-c"]
    assert of("cpu") == ["cpu"]
    with pytest.raises(NoSuchDevice, match="GPU-x: this host has GPU-a, GPU-b, GPU-c"):
        of("GPU-x")


def test_cuda_visible_devices_narrows_what_a_worker_takes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(Gpu("GPU-aaaa-1"), Gpu("GPU-bbbb-2"), Gpu("GPU-cccc-3"))

    def of(visible: str) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return [device.uuid for device in found(nvml, Settings(home=settings.home))]

    assert of("1") == ["GPU-bbbb-2"]
    assert of("GPU-cccc, 0") == ["GPU-cccc-3", "GPU-aaaa-1"]
    assert of("0,7,1") == ["GPU-aaaa-1"], "CUDA ends its list at the first unknown one"
    assert of("") == ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"]
    assert of("-1") == ["cpu"]
    with pytest.raises(NoSuchDevice, match="CUDA_VISIBLE_DEVICES=GPU-zzzz: this host has GPU-aaaa-1"):
        of("GPU-zzzz")


def test_a_leased_gpu_is_reported_as_it_was_when_free_whoever_nvml_says_is_on_it(settings: Settings) -> None:
    gpu, memory = Gpu("GPU-a", used=2 * GIB), IdleMemory()  # a desktop

    def look(*, leased: set[str]) -> tuple[int, int]:
        (device,) = memory.applied(found(FakeNvml(gpu), settings), leased=leased)
        return device.free_bytes, device.foreign_bytes

    before = look(leased=set())
    gpu.used, gpu.processes = 60 * GIB, {4_000_000: 58 * GIB}  # our trainer, by a number of the host's
    during = look(leased={"GPU-a"})
    gpu.processes = {12: 0}  # by ours, without its memory
    also = look(leased={"GPU-a"})
    gpu.processes = {4_000_000: 58 * GIB}
    stranger = look(leased=set())

    assert before == during == also == (78 * GIB, 0)
    assert stranger == (20 * GIB, 58 * GIB)
    assert IdleMemory().applied(cpu(settings), leased={"cpu"}) == cpu(settings)


class FakeAmdSmi:
    """Answers as AMD's API reference describes."""

    class AmdSmiException(Exception):
        pass

    def __init__(self, *, driver: bool = True, ecc: int = 0) -> None:
        self.driver, self.ecc = driver, ecc

    def amdsmi_init(self) -> None:
        if not self.driver:
            raise self.AmdSmiException

    def amdsmi_shut_down(self) -> None:
        self.driver = False

    def amdsmi_get_processor_handles(self) -> list[int]:
        return [0]

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, str]:
        return {"market_name": "Instinct MI300X", "asic_serial": "0x82A3C2D1E0F4B596"}

    def amdsmi_get_gpu_vram_usage(self, handle: int) -> dict[str, int]:
        return {"vram_total": 192 * 1024, "vram_used": 48 * 1024}

    def amdsmi_get_gpu_process_list(self, handle: int) -> list[dict[str, Any]]:
        return [
            {"name": "python", "pid": 7, "mem": 0, "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": 32 * GIB}},
            {"name": "x", "pid": 99, "mem": 0, "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": 16 * GIB}},
        ]

    def amdsmi_get_gpu_total_ecc_count(self, handle: int) -> dict[str, int]:
        return {"correctable_count": 5, "uncorrectable_count": self.ecc, "deferred_count": 0}


def test_an_amd_gpu_is_found_where_rocms_library_is_there(settings: Settings) -> None:
    def on(smi: FakeAmdSmi) -> Any:
        return discover(settings, own_pids={7}, nvml=FakeNvml(driver=False), load_amdsmi=lambda: smi)

    (device,), (ill,), (other,) = on(FakeAmdSmi()), on(FakeAmdSmi(ecc=1)), on(FakeAmdSmi(driver=False))

    assert (device.uuid, device.kind, device.name) == ("GPU-82a3c2d1e0f4b596", "rocm", "Instinct MI300X")
    assert (device.total_bytes, device.free_bytes, device.foreign_bytes) == (192 * GIB, 176 * GIB, 16 * GIB)
    assert (device.healthy, ill.healthy) == (True, False)
    assert other.kind == "cpu"


def test_rocms_library_is_no_dependency() -> None:
    assert rocm.load_amdsmi() is None


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
        ("rocm", {"ROCR_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
        ("cpu", {"CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_a_trainer_sees_its_own_devices_and_no_other(tmp_path: Path, kind: str, seen: dict[str, str]) -> None:
    environment = launcher.environment(
        tag=Tag(str(tmp_path), "ftjob-1", 1, 1, 1.0),
        device_ids=("h:GPU-a", "h:GPU-b"),
        kind=kind,
        threads=2,
        scratch=tmp_path,
    )

    assert {name: value for name, value in environment.items() if name.endswith("VISIBLE_DEVICES")} == seen
