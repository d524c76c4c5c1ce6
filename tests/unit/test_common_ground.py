"""The ground of a settled job: equal for jobs that may share a base, and for no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.contract.cotraining import reason_not_together
from shared.contract.spec import AttemptSpec
from shared.settle.common_ground import ground
from shared.settle.resolve import Resolution
from shared.settle.workload import keeps_copy
from tests.unit.test_resolve import CPU, GPU, settled

UNLIKE: list[dict[str, Any]] = [
    {"adapter": {"method": "lora"}},
    {"adapter": {"method": "lora", "r": 32, "target_modules": ["q_proj"]}},
    {"adapter": {"method": "qlora"}},
    {"adapter": {"method": "qlora", "r": 4}},
    {"adapter": {"method": "qlora", "lora_dropout": 0.1}},
    {"adapter": {"method": "qdora"}},
    {"adapter": {"method": "qlora"}, "quantization": {"bnb_4bit_quant_type": "fp4"}},
    {"adapter": {"method": "lora"}, "training": {"dtype": "float32"}},
]


def spec_of(one: Resolution, job_id: str) -> AttemptSpec:
    return AttemptSpec(
        job_id=job_id,
        model_name="ft:tiny",
        job=one.spec,
        base_model_path="/models/base",
        train_file="/rows",
        micro_batch_size=1,
        device="cpu",
        keep_dequantized=keeps_copy(one.spec, device="cpu", memory=2**50),
    )


@pytest.mark.parametrize("first", UNLIKE, ids=str)
def test_jobs_of_one_ground_can_train_together_and_what_cannot_has_another(first: dict[str, Any]) -> None:
    one = settled(tunepool=first)
    for second in UNLIKE:
        other = settled(tunepool=second)
        reason = reason_not_together([spec_of(one, "ftjob-a"), spec_of(other, "ftjob-b")])
        theirs, ours = ground(other), ground(one)
        assert ours is not None
        assert theirs is not None
        assert (ours.words == theirs.words) == (reason is None), reason


@pytest.mark.parametrize(
    "adapter",
    [{"method": "full"}, {"method": "lora", "modules_to_save": ["lm_head"]}, {"method": "lora", "bias": "all"}],
    ids=str,
)
def test_a_job_that_trains_its_base_has_no_ground(adapter: dict[str, Any]) -> None:
    assert (
        ground(settled(device=replace(GPU, total_bytes=2**42, free_bytes=2**42), tunepool={"adapter": adapter})) is None
    )


def test_another_revision_is_another_ground() -> None:
    one = settled()
    base = one.spec.base_model.model_copy(update={"revision": "1" * 40})
    other = replace(one, spec=one.spec.model_copy(update={"base_model": base}))

    assert ground(one) != ground(other)


def test_the_base_is_what_the_estimate_holds_of_it_and_less_where_less_is_asked_for() -> None:
    one = settled()
    found, terms = ground(one), one.estimate.terms
    assert found is not None
    assert terms["weights"] < found.base_bytes <= terms["weights"] + terms["process"]

    measured = replace(one, bytes_per_device=one.estimate.total // 2)
    half = ground(measured)
    assert half is not None
    assert half.base_bytes == pytest.approx((terms["weights"] + terms["process"]) / 2, rel=1e-6)
    assert measured.bytes_per_device - half.base_bytes > 0


def test_a_copy_of_four_bit_weights_belongs_to_each_job() -> None:
    one = settled(device=CPU, tunepool={"adapter": {"method": "qlora"}})
    found = ground(one)
    assert found is not None
    assert found.base_bytes <= one.estimate.terms["weights"] + one.estimate.terms["process"]
