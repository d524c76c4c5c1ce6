"""Which devices fit a job and why not the others, and how long it will take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.contract.spec import DeviceKind, JobSpec, Placement
from shared.plan.capacity import Abilities
from shared.settle.device_fit import Candidate, fits, needs, offered
from shared.settle.durations import predict
from shared.settle.settling import DeviceFacts
from shared.store.tables import DeviceRow
from tests.factories import make_spec
from worker.chores import preflighting

GB = 10**9
GPU = Candidate(
    id="h:1",
    name="NVIDIA A100",
    kind="cuda",
    total_bytes=80 * GB,
    free_bytes=80 * GB,
    foreign_bytes=0,
    bfloat16=True,
    usable=True,
    busy=False,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total_bytes": GB}, "it offers 0.9 GiB"),
        ({"foreign_bytes": 79 * GB + GB // 2}, "74.0 GiB are held by others"),
        ({"free_bytes": GB}, "it offers 0.9 GiB"),
        ({"bfloat16": False}, "no bfloat16"),
        ({"usable": False}, "unhealthy or quarantined"),
    ],
)
def test_a_device_that_does_not_fit_says_why(change: dict, words: str) -> None:
    (found,) = fits(make_spec(), [replace(GPU, **change)], measurements=())

    assert not found.fits
    assert words in found.reason


def test_a_busy_device_fits_and_says_that_it_is_busy() -> None:
    free, busy = fits(make_spec(), [GPU, replace(GPU, busy=True)], measurements=())

    assert free.fits
    assert busy.fits
    assert free.reason.endswith("free now")
    assert busy.reason.endswith("busy now")


def test_a_cpu_does_not_train_in_float16() -> None:
    (found,) = fits(make_spec(dtype="float16"), [replace(GPU, kind="cpu")], measurements=())

    assert "float16" in found.reason


def test_a_gpu_offers_what_is_free_when_no_job_is_there_and_what_a_stranger_will_leave() -> None:
    desktop = offered("cuda", total=24 * GB, free=22 * GB, foreign=0)
    stranger = offered("cuda", total=24 * GB, free=2 * GB, foreign=20 * GB)
    little = offered("cuda", total=24 * GB, free=23 * GB, foreign=GB // 5)

    assert (desktop, stranger, little) == (22 * GB, 22 * GB, 23 * GB)
    assert offered("cpu", total=16 * GB, free=3 * GB, foreign=0) == 16 * GB


def settled_for(kind: DeviceKind, *, bfloat16: bool) -> DeviceFacts:
    return DeviceFacts(kind=kind, total_bytes=80 * GB, free_bytes=80 * GB, bfloat16=bfloat16)


def test_a_job_needs_what_it_was_settled_for() -> None:
    allowed = make_spec().model_copy(update={"placement": Placement(allow_cpu=True)})

    assert needs(make_spec(dtype="bfloat16"), settled_for("cuda", bfloat16=True)) == Abilities(
        gpu=True, bfloat16=True, capability=80
    )
    assert needs(make_spec(dtype="float16"), settled_for("cuda", bfloat16=False)) == Abilities(gpu=True)
    assert needs(make_spec(dtype="float32"), settled_for("cpu", bfloat16=False)) == Abilities()
    assert not needs(allowed, settled_for("cuda", bfloat16=True)).gpu


def test_a_preflight_says_that_a_gpus_job_does_not_start_on_a_cpu() -> None:
    (found,) = fits(make_spec(), [replace(GPU, kind="cpu")], measurements=(), abilities=Abilities(gpu=True))

    assert not found.fits
    assert "placement.allow_cpu" in found.reason


def test_a_preflight_takes_an_amd_gpu_for_a_gpu() -> None:
    row = DeviceRow(
        id="h:0",
        name="Instinct MI300X",
        kind="rocm",
        total_bytes=192 * GB,
        free_bytes=192 * GB,
        foreign_bytes=0,
        bfloat16=True,
        healthy=True,
        quarantined=False,
    )

    device = preflighting.candidate(row)

    assert fits(make_spec(dtype="float16"), [device], measurements=())[0].fits
    assert device.kind == "cuda"


def seconds(spec: JobSpec, *, device: str = "NVIDIA A100", speeds: tuple[float, ...] = ()) -> float:
    found = predict(spec, tokens=1e6, device_name=device, speeds=speeds)
    assert found is not None
    assert found.low < found.expected < found.high
    return found.expected


def test_finished_jobs_tell_the_time_better_than_arithmetic() -> None:
    assert seconds(make_spec(), speeds=(100.0, 200.0, 400.0)) == pytest.approx(5000)
    alone = predict(make_spec(), tokens=1e6, device_name="NVIDIA A100", speeds=())
    assert alone is not None
    assert "arithmetic alone" in alone.basis


def test_arithmetic_knows_the_device_and_the_cost_of_checkpointing() -> None:
    plain = seconds(make_spec())

    assert seconds(make_spec(), device="NVIDIA H100 80GB") < plain
    assert seconds(make_spec(gradient_checkpointing=True)) == pytest.approx(1.5 * plain, rel=0.1)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("NVIDIA L4", "NVIDIA L40"),
        ("NVIDIA L40", "NVIDIA L40S"),
        ("RTX 4090", "RTX 5090"),
    ],
)
def test_cards_whose_names_begin_alike_are_told_apart(slower: str, faster: str) -> None:
    assert seconds(make_spec(), device=slower) > seconds(make_spec(), device=faster)


def test_nothing_known_is_no_prediction() -> None:
    assert predict(make_spec(), tokens=1e6, device_name="Unheard-of", speeds=()) is None
