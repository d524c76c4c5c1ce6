"""Only as many layers recompute their activations as memory demands; the cost is weighed against that of a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.contract.job_request import CreateJob
from shared.contract.spec import DataFacts, JobSpec
from shared.errors import Invalid
from shared.settle.catalogue import SMOLLM2
from shared.settle.durations import operations_per_token
from shared.settle.memory_fit import peak
from shared.settle.refusals import check_request
from shared.settle.resolve import Resolution, resolve
from shared.settle.settling import DeviceFacts
from shared.settle.sizing import estimate
from shared.settle.workload import Workload, workload
from tests.factories import LLAMA_8B, make_spec
from worker.attempt.rungs import lower

GIB = 2**30
LAYERS = "training.gradient_checkpointing_layers"


def card(gib: float) -> DeviceFacts:
    total = int(gib * GIB)
    return DeviceFacts(kind="cuda", total_bytes=total, free_bytes=total, bfloat16=True, capability=(8, 0))


def settled(gib: float, **training: Any) -> Resolution:
    """A QLoRA of Llama 3.1 8B on 2,000 rows of 300 tokens."""
    job = CreateJob.model_validate({"model": "m", "training_file": "file-a", "tunepool": {"training": training}})
    rows = DataFacts(format="chat", train_rows=2000, mean_characters=800.0, max_characters=4000)
    base = SMOLLM2.ref.model_copy(update={"facts": LLAMA_8B})
    return resolve(job, base=base, data=rows, device=card(gib), seed=7)


def asked_for(job: Resolution, layers: int | None, gib: float) -> int:
    """What the same job would hold with so many layers recomputed."""
    training = job.spec.training.model_copy(
        update={"gradient_checkpointing": layers != 0, "gradient_checkpointing_layers": layers or None}
    )
    spec = job.spec.model_copy(update={"training": training})
    work = workload(spec, device="cuda", memory=int(gib * GIB))
    return job.calibration.upper(peak(work).total)


@pytest.mark.parametrize("gib", [16, 20, 24])
def test_the_fewest_layers_recompute_that_leave_the_job_within_the_device(gib: float) -> None:
    job = settled(gib)
    layers = job.spec.training.gradient_checkpointing_layers

    assert job.spec.training.gradient_checkpointing
    assert layers is not None
    assert job.fits
    assert asked_for(job, layers, gib) == job.bytes_per_device <= card(gib).budget
    assert asked_for(job, layers - 1, gib) > card(gib).budget
    reasons = {value.field: value.reason for value in job.auto}
    assert f"{layers} of 32 layers" in reasons["training.gradient_checkpointing"]
    assert "fewest" in reasons[LAYERS]


def test_more_memory_never_recomputes_more() -> None:
    cards = (12, 14, 16, 20, 24, 32, 40, 48, 80)
    costs = [operations_per_token(settled(gib, per_device_train_batch_size=1).spec) for gib in cards]

    assert costs == sorted(costs, reverse=True)


def test_a_card_with_room_recomputes_nothing_and_a_full_one_everything() -> None:
    roomy, narrow = settled(80).spec.training, settled(8).spec.training

    assert (roomy.gradient_checkpointing, roomy.gradient_checkpointing_layers) == (False, None)
    assert narrow.gradient_checkpointing


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"gradient_checkpointing": True}, (True, None)),
        ({"gradient_checkpointing": False, "max_length": 512}, (False, None)),
        ({"gradient_checkpointing_layers": 5}, (True, 5)),
        ({"gradient_checkpointing": True, "gradient_checkpointing_layers": 32}, (True, 32)),
    ],
)
def test_what_is_asked_for_stays(asked: dict[str, Any], found: tuple[bool, int | None]) -> None:
    training = settled(24, **asked).spec.training

    assert (training.gradient_checkpointing, training.gradient_checkpointing_layers) == found


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"gradient_checkpointing": False, "gradient_checkpointing_layers": 5}, "set it to true, or drop the number"),
        ({"gradient_checkpointing_layers": 33}, "has 32 layers; leave it out"),
    ],
)
def test_a_number_that_nothing_can_be_done_with_is_refused(asked: dict[str, Any], why: str) -> None:
    job = CreateJob.model_validate({"model": "m", "training_file": "file-a", "tunepool": {"training": asked}})
    with pytest.raises(Invalid, match=why) as refused:
        check_request(job, SMOLLM2.ref.model_copy(update={"facts": LLAMA_8B}))

    assert refused.value.param == f"tunepool.{LAYERS}"


@given(layers=st.integers(1, 32), tokens=st.integers(64, 8192), method=st.sampled_from(["lora", "qlora", "full"]))
def test_the_estimate_lies_between_none_and_all(layers: int, tokens: int, method: Any) -> None:
    base = Workload(facts=LLAMA_8B, method=method, length=tokens)
    none, some, every = (
        estimate(work).total
        for work in (
            base,
            replace(base, gradient_checkpointing=True, recomputed=layers),
            replace(base, gradient_checkpointing=True),
        )
    )

    assert every <= some <= none
    assert estimate(replace(base, gradient_checkpointing=True, recomputed=32)).total == every


def test_the_time_follows_the_layers_that_compute_twice() -> None:
    def operations(**training: Any) -> float:
        spec = make_spec(**training)
        lora = spec.adapter.model_copy(update={"method": "lora"})
        return operations_per_token(spec.model_copy(update={"adapter": lora}))

    none = operations()
    half = SMOLLM2.ref.facts.num_hidden_layers // 2
    some = operations(gradient_checkpointing=True, gradient_checkpointing_layers=half)

    assert operations(gradient_checkpointing=True) == pytest.approx(1.5 * none)
    assert some == pytest.approx(1.25 * none)


def test_a_spec_without_the_number_is_written_as_the_version_before_reads_it() -> None:
    plain, named = make_spec(), make_spec(gradient_checkpointing=True, gradient_checkpointing_layers=3)

    assert "gradient_checkpointing_layers" not in plain.model_dump(mode="json")["training"]
    assert named.model_dump(mode="json")["training"]["gradient_checkpointing_layers"] == 3
    for spec in (plain, named):
        assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_out_of_memory_with_some_layers_recomputed_is_tried_with_all_of_them_first() -> None:
    spec = make_spec(gradient_checkpointing=True, gradient_checkpointing_layers=3, per_device_train_batch_size=4)
    now: dict[str, Any] = {"micro_batch_size": 4, "gradient_checkpointing": True, "pass_tokens": None}

    first = lower(spec, kind="cuda", recomputed=3, **now)
    second = lower(spec, kind="cuda", recomputed=None, **now)

    assert first is not None
    assert first.next_try == {"gradient_checkpointing": True}
    assert "with 3 layers recomputed; trying again with gradient checkpointing of all" in first.message
    assert second is not None
    assert second.next_try != first.next_try
