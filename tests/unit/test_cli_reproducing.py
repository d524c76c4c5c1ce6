"""`tunepool reproduce`: what it asks for can be settled in one way only; what differs is told from what is equal."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file
from tunepool import likeness
from tunepool.reproducing import JobOutput, Reproduction, differences, request_of

from shared.contract.base_facts import ModelFacts
from shared.contract.job_request import CreateJob
from shared.contract.spec import DataFacts, JobSpec
from shared.settle.catalogue import SMOLLM2
from shared.settle.refusals import check_request
from shared.settle.resolve import resolve
from shared.settle.settling import DeviceFacts

GB = 10**9
CPU = DeviceFacts(kind="cpu", total_bytes=16 * GB, free_bytes=14 * GB, bfloat16=False)
GPU = DeviceFacts(kind="cuda", total_bytes=24 * GB, free_bytes=23 * GB, bfloat16=True)
LARGER = DeviceFacts(kind="cuda", total_bytes=80 * GB, free_bytes=78 * GB, bfloat16=True)
ROWS: dict[str, Any] = {"format": "chat", "train_rows": 1000, "mean_characters": 800.0, "max_characters": 4000}
EVEN = {**ROWS, "mean_characters": 3900.0}
LONG = {**ROWS, "mean_characters": 9000.0, "max_characters": 40_000}
PAIRS = {**ROWS, "format": "preference"}
VALIDATED = {**ROWS, "validation_rows": 50}


def settled(request: dict[str, Any], rows: dict[str, Any], device: DeviceFacts) -> JobSpec:
    job = CreateJob.model_validate({"training_file": "file-a", "model": "m", **request})
    base = SMOLLM2.ref
    check_request(job, base)
    return resolve(job, base=base, data=DataFacts.model_validate(rows), device=device, seed=request.get("seed", 7)).spec


@pytest.mark.parametrize(
    ("request_of_then", "rows", "device"),
    [
        ({}, ROWS, CPU),
        ({}, EVEN, GPU),
        ({}, LONG, GPU),
        ({"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 3}}, ROWS, GPU),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}}, PAIRS, CPU),
        ({"tunepool": {"preset": "complex", "queue": {"group": "g", "supersede": True}}}, ROWS, GPU),
        ({"tunepool": {"training": {"max_steps": 30, "packing": "auto"}}}, ROWS, CPU),
        ({"tunepool": {"adapter": {"method": "full"}}}, ROWS, GPU),
        ({"tunepool": {"adapter": {"use_rslora": True, "r": 64}, "quantization": {"load_in_4bit": False}}}, ROWS, GPU),
        ({"tunepool": {"adapter": {"method": "dora", "layers_to_transform": [0, 1], "target_modules": ["q_proj"]}}},
         ROWS, CPU),
        ({"tunepool": {"placement": {"strategy": "ddp", "gpus": 2}}}, ROWS, GPU),
        ({"validation_file": "file-b", "tunepool": {"training": {"early_stopping": None}}}, VALIDATED, CPU),
    ],
)  # fmt: skip
def test_what_is_asked_for_again_is_settled_as_it_was_whatever_device_is_there(
    request_of_then: dict[str, Any], rows: dict[str, Any], device: DeviceFacts
) -> None:
    then = settled(request_of_then, rows, device)
    training = then.training
    stated = {
        "spec": then.model_dump(mode="json"),
        "micro_batch_size": training.per_device_train_batch_size,
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_layers": training.gradient_checkpointing_layers,
    }

    body = request_of(request_of_then, stated)
    files = {"validation_file": "file-b"} if rows is VALIDATED else {}

    for other in (device, LARGER):
        now = settled({**body, **files}, rows, other)
        assert now.model_copy(update={"queue": then.queue}) == then
    assert "queue" not in body["tunepool"], "it would supersede others"


def test_a_micro_batch_that_had_to_shrink_is_asked_for_as_it_was_at_last() -> None:
    spec = settled({}, ROWS, GPU).model_dump(mode="json")

    body = request_of({}, {"spec": spec, "micro_batch_size": 1, "gradient_checkpointing": True})

    assert body["tunepool"]["training"]["per_device_train_batch_size"] == 1
    assert body["tunepool"]["training"]["gradient_checkpointing"] is True


def test_a_job_is_written_again_with_the_time_that_its_template_wrote_then() -> None:
    spec = settled({}, ROWS, GPU).dated(datetime(2026, 11, 30, 23, 59, 58, tzinfo=UTC)).model_dump(mode="json")

    body = request_of({}, {"spec": spec, "micro_batch_size": 1, "gradient_checkpointing": False})

    assert body["tunepool"]["training"]["template_time"] == "2026-11-30T23:59:58"
    again = settled(body, ROWS, GPU)
    assert again.dated(datetime(2027, 1, 1, tzinfo=UTC)).training.template_time == "2026-11-30T23:59:58"


# --- curves ---------------------------------------------------------------------------------------------------------

HEAD = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"


def test_a_curve_differs_first_where_its_first_other_figure_is() -> None:
    then = f"{HEAD}1,2.5,0.1,,\n2,2.25,0.2,2.4,0.3\n3,2.0,0.3,,\n"
    now = f"{HEAD}1,2.5,0.1,,\n2,2.25,0.2,2.42,0.3\n3,1.0,0.3,,\n"

    found = likeness.of_curves(then, now, tolerance=0.0)

    assert found.first == "valid_loss of step 2: 2.4 then, 2.42 now"
    assert (found.within, found.off) == (False, pytest.approx(0.5))
    assert likeness.of_curves(then, now, tolerance=0.5).within
    assert likeness.of_curves(then, then, tolerance=0.0) == likeness.RelativeDifference(
        within=True, off=0.0, first=None
    )


@pytest.mark.parametrize("now", [f"{HEAD}1,2.5,,,\n", f"{HEAD}1,2.5,,,\n2,nan,,,\n"], ids=["shorter", "no number"])
def test_a_step_that_is_missing_or_no_number_is_within_no_tolerance(now: str) -> None:
    found = likeness.of_curves(f"{HEAD}1,2.5,,,\n2,2.25,,,\n", now, tolerance=1.0)

    assert not found.within
    assert found.first is not None
    assert found.first.startswith("train_loss of step 2")
    assert found.document()["off"] is None


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_weights_are_as_far_apart_as_numpy_reckons_them(tmp_path: Path, dtype: str) -> None:
    numbers = numpy.random.default_rng(0)
    then = {name: numbers.standard_normal((8, 5)).astype(dtype) for name in ("a", "b")}
    now = {**then, "b": (then["b"] + 0.01).astype(dtype)}
    for name, weights in (("then", then), ("now", now)):
        save_file(weights, tmp_path / name)
    flat = [numpy.concatenate([made[name].ravel().astype("float64") for name in "ab"]) for made in (then, now)]

    found = likeness.of_weights(tmp_path / "then", tmp_path / "now", tolerance=0.05)

    assert found.off == pytest.approx(numpy.linalg.norm(flat[0] - flat[1]) / numpy.linalg.norm(flat[0]), rel=1e-6)
    assert found.within
    assert found.first is not None
    assert found.first.startswith("b, by up to 0.01")
    assert not likeness.of_weights(tmp_path / "then", tmp_path / "now", tolerance=0.001).within
    assert likeness.of_weights(tmp_path / "then", tmp_path / "then", tolerance=0.0).first is None


def bfloat16_file(place: Path, *values: float) -> Path:
    """A tensor of 16-bit brain floats: the upper halves of 32-bit numbers."""
    data = b"".join(struct.pack("<f", value)[2:] for value in values)
    header = b'{"a":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (len(values), len(data))
    place.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return place


def test_brain_floats_are_read_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    then, now = bfloat16_file(tmp_path / "then", 3.0, 4.0, -1.5), bfloat16_file(tmp_path / "now", 3.0, 4.0, -1.25)

    found = likeness.of_weights(then, now, tolerance=0.0)

    assert found.first == "a, by up to 0.25"
    assert found.off == pytest.approx(0.25 / (9 + 16 + 2.25) ** 0.5)


def test_other_shapes_other_tensors_and_other_files_differ_whatever_the_tolerance(tmp_path: Path) -> None:
    shapes = {"then": {"a": numpy.zeros((2, 3), "f4")}, "now": {"a": numpy.zeros((3, 2), "f4")}}
    shapes["less"] = {"b": numpy.zeros((2, 3), "f4")}
    for name, weights in shapes.items():
        save_file(weights, tmp_path / name)
    (tmp_path / "none").write_text("weights")

    for name in ("now", "less", "none"):
        found = likeness.of_weights(tmp_path / "then", tmp_path / name, tolerance=1.0)
        assert (found.within, found.first is not None) == (False, True), name


# --- verdicts -------------------------------------------------------------------------------------------------------

EQUAL = likeness.RelativeDifference(within=True, off=0.0, first=None)
NEAR = likeness.RelativeDifference(within=True, off=0.01, first="a, by up to 0.1")
FAR = likeness.RelativeDifference(within=False, off=0.5, first="a, by up to 3")


@pytest.mark.parametrize(
    ("curve", "weights", "files", "verdict"),
    [
        (EQUAL, EQUAL, [], "same"),
        (NEAR, NEAR, ["adapter_model.safetensors"], "within_tolerance"),
        (EQUAL, FAR, ["adapter_model.safetensors"], "differs"),
        (FAR, EQUAL, [], "differs"),
        (EQUAL, EQUAL, ["adapter_config.json"], "differs"),
    ],
)
def test_the_verdict_is_of_curves_weights_and_all_other_files(
    curve: likeness.RelativeDifference, weights: likeness.RelativeDifference, files: list[str], verdict: str
) -> None:
    result = Reproduction("ftjob-1", 0.05, curve=curve, weights=weights, differing=files)

    assert result.verdict == verdict
    assert verdict == "same" or result.first


def test_what_differs_between_two_statements_is_named_and_how_the_jobs_waited_is_not() -> None:
    facts: ModelFacts = SMOLLM2.ref.facts
    assert facts.hidden_size  # the facts are no setting

    def made(**changes: Any) -> JobOutput:
        spec = settled({"tunepool": {"queue": {"priority": changes.get("priority", 0)}}}, ROWS, CPU)
        spec = spec.model_copy(update={"seed": changes.get("seed", 7)})
        internal = {"spec": spec.model_dump(mode="json"), "micro_batch_size": 1, "gradient_checkpointing": False}
        internal |= {"device_kind": changes.get("kind", "cpu"), "devices": ["a CPU"]}
        sources = [{"name": "training_file", "digest": {"sha256": "ab"}}, {"name": "source", "digest": changes}]
        build = {"internalParameters": internal, "resolvedDependencies": sources}
        version = {"torch": changes.get("torch", "2.13.0")}
        return JobOutput(
            "ft:m", {}, {"predicate": {"buildDefinition": build, "runDetails": {"builder": {"version": version}}}}
        )

    assert list(differences(made(), made(priority=5))) == []
    assert sorted(differences(made(), made(seed=8, torch="2.14.0", kind="cuda"))) == [
        "devices: cpu (a CPU) then, cuda (a CPU) now",
        "setting seed: 7 then, 8 now",
        "torch: 2.13.0 then, 2.14.0 now",
    ]
