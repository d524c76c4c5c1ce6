"""The memory estimate agrees with what others measured, and moves the right way."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import memory_by_method
from bench.memory_estimates import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, errors, points
from shared.contract.base_facts import ModelFacts
from shared.contract.merge_request import CombinationType
from shared.contract.passes import KEPT_SHARE
from shared.contract.spec import Adapter, DeviceKind
from shared.settle.calibration import Calibration, Measurement, bucket, calibrate
from shared.settle.catalogue import SMOLLM2
from shared.settle.product_memory import estimate_combination, estimate_merge
from shared.settle.sizing import adapter_parameters, estimate, estimate_evaluation, quantizable_parameters
from shared.settle.workload import Workload, workload
from tests.factories import make_spec

GB = 10**9
SEVEN = Workload(facts=LLAMA_2_7B, optim="adamw_torch", length=512)


def test_published_measurements_are_met_to_8_percent_in_the_median_and_20_percent_in_nine_of_ten() -> None:
    found = errors([point for point in points() if not point.outlier])
    assert found.count >= 70
    assert found.median <= 0.08
    assert found.within_20 >= 0.90


def test_points_set_aside_are_few_and_say_why() -> None:
    aside = [point for point in points() if point.outlier]
    assert len(aside) <= 0.25 * len(points())
    assert all(len(point.outlier) > 20 for point in aside)


@pytest.mark.parametrize(
    ("work", "least", "most"),
    [
        (replace(SEVEN, method="full", gradient_checkpointing=True), 100, 130),
        (replace(SEVEN, method="lora", dtype="float16"), 15, 22),
        (replace(SEVEN, method="qlora", gradient_checkpointing=True), 5, 8),
        (replace(SEVEN, method="lora", facts=LLAMA_2_13B, gradient_checkpointing=True), 26, 34),
        (replace(SEVEN, method="qlora", facts=LLAMA_2_13B, gradient_checkpointing=True), 8, 14),
        (replace(SEVEN, method="qlora", facts=LLAMA_2_70B, gradient_checkpointing=True), 38, 50),
    ],
    ids=["7B full", "7B LoRA", "7B QLoRA", "13B LoRA", "13B QLoRA", "70B QLoRA"],
)
def test_the_table_that_users_know_comes_out(work: Workload, least: int, most: int) -> None:
    assert least * GB <= estimate(work).total <= most * GB


@pytest.mark.parametrize(("dequantized", "gigabytes"), [(False, 1.09), (True, 1.18)])
def test_a_merge_is_estimated_near_what_it_was_measured_to_hold(*, dequantized: bool, gigabytes: float) -> None:
    merge = estimate_merge(make_spec(), dequantized=dequantized)

    assert merge.total == pytest.approx(gigabytes * GB, rel=0.2)


WIDE = ModelFacts(
    architecture="LlamaForCausalLM",
    parameters=55_000_000,
    hidden_size=2048,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    intermediate_size=6144,
    vocab_size=260,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


# Megabytes of two and of four adapters, by `bench/product_memory.py`.
COMBINED: dict[str, tuple[int, int]] = {
    "linear": (543, 546),
    "cat": (544, 547),
    "ties": (547, 554),
    "dare_linear": (544, 548),
    "dare_ties": (550, 553),
    "magnitude_prune": (546, 549),
    "svd": (894, 1197),
    "dare_linear_svd": (894, 1197),
    "magnitude_prune_svd": (1070, 1272),
    "dare_ties_svd": (1222, 1751),
    "ties_svd": (1248, 1828),
}


@pytest.mark.parametrize("kind", get_args(CombinationType))
def test_a_combination_is_estimated_near_what_it_was_measured_to_hold(kind: CombinationType) -> None:
    base = SMOLLM2.ref.model_copy(update={"facts": WIDE})
    adapter = Adapter(method="lora", r=16, target_modules=["down_proj"])
    wide = make_spec().model_copy(update={"base_model": base, "adapter": adapter})

    for adapters, megabytes in zip((2, 4), COMBINED[kind], strict=True):
        estimated = estimate_combination(wide, adapters=adapters, combination_type=kind).total
        assert estimated == pytest.approx(megabytes * 1e6, rel=0.1)


def test_parameter_counts_are_those_of_the_real_model() -> None:
    facts = SMOLLM2.ref.facts
    work = Workload(facts=facts, r=16)
    norms = (2 * facts.num_hidden_layers + 1) * facts.hidden_size
    assert quantizable_parameters(facts) + facts.vocab_size * facts.hidden_size + norms == facts.parameters
    assert adapter_parameters(work) == 4_884_480  # 30 layers of 16·(2·1152 + 2·768 + 3·2112)
    assert adapter_parameters(replace(work, layers=15)) == 4_884_480 // 2


@settings(max_examples=80)
@given(
    method=st.sampled_from(["lora", "qlora", "dora", "qdora", "full"]),
    r=st.integers(1, 512),
    micro=st.integers(1, 64),
    length=st.integers(8, 32768),
    checkpointing=st.booleans(),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_more_rank_rows_or_length_never_needs_less(
    *, method: str, r: int, micro: int, length: int, checkpointing: bool, device: str
) -> None:
    work = Workload(
        facts=LLAMA_2_7B,
        method=method,  # type: ignore[arg-type]
        r=r,
        micro_batch=micro,
        length=length,
        gradient_checkpointing=checkpointing,
        device=device,  # type: ignore[arg-type]
    )
    size = estimate(work).total
    assert size == sum(estimate(work).terms.values())
    assert estimate(replace(work, r=r + 1)).total >= size
    assert estimate(replace(work, micro_batch=micro + 1)).total > size
    assert estimate(replace(work, length=length + 1)).total > size
    assert estimate(replace(work, gradient_checkpointing=True)).total <= size
    assert estimate_evaluation(work).total < size


def test_the_copy_that_a_cpu_keeps_is_in_its_estimate_and_in_no_other() -> None:
    facts = SMOLLM2.ref.facts

    def copy(memory: int, *, device: DeviceKind = "cpu", **adapter: object) -> int:
        spec = make_spec()
        spec = spec.model_copy(update={"adapter": spec.adapter.model_copy(update=adapter)})
        return estimate(workload(spec, device=device, memory=memory)).terms["16-bit copy"]

    just_enough = math.ceil(2 * facts.parameters / KEPT_SHARE) + 1
    assert copy(just_enough) == 2 * quantizable_parameters(facts)
    assert copy(just_enough, layers_to_transform=[0, 1, 2]) == 2 * quantizable_parameters(facts) // 10
    assert copy(just_enough - 2) == 0
    assert (
        copy(just_enough, device="cuda")
        == copy(just_enough, method="qdora")
        == copy(just_enough, lora_dropout=0.1)
        == 0
    )


def test_methods_order_as_everyone_expects() -> None:
    sizes = [estimate(replace(SEVEN, method=method)).total for method in ("qlora", "qdora", "lora", "dora", "full")]
    assert sizes == sorted(sizes)


LLAMA_70B = LLAMA_2_7B.model_copy(
    update={
        "parameters": 70_553_706_496,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "vocab_size": 128256,
    }
)


@pytest.mark.parametrize(("r", "gigabytes"), [(16, 17.4), (64, 23.6)])
def test_fsdp_keeps_the_adapter_and_the_embeddings_whole(r: int, gigabytes: float) -> None:
    """The figures are those of worker/train/sharding.py by hand, 2,048 packed tokens with checkpointing."""
    work = Workload(
        facts=LLAMA_70B,
        method="qlora",
        r=r,
        length=2048,
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
        shards=8,
    )
    spread = estimate(work)

    assert spread.total == pytest.approx(gigabytes * GB, rel=0.1)
    for name in ("trained weights", "gradients", "optimizer"):
        assert spread.terms[name] == estimate(replace(work, shards=1)).terms[name]


def test_scales_of_four_bit_weights_stay_whole() -> None:
    work = Workload(facts=LLAMA_70B, method="qlora", r=16, length=2048, optim="adamw_torch", shards=8)

    # 8 bits for each 64 weights and a float32 for each 256 of those: 1.1 GB of 70B, of which an eighth is counted.
    assert estimate(work).terms["scales"] == pytest.approx(0.875 * 68.5e9 * (1 + 4 / 256) / 64, rel=0.01)
    assert "scales" not in estimate(replace(work, shards=1)).terms
    assert "scales" not in estimate(replace(work, method="lora")).terms


def test_sharding_divides_what_stands_and_replicas_do_not() -> None:
    alone, sharded, copied = SEVEN, replace(SEVEN, shards=4), replace(SEVEN, replicas=4)
    assert estimate(sharded).terms["weights"] == math.ceil(estimate(alone).terms["weights"] / 4)
    assert estimate(copied).total >= estimate(alone).total


CPU = Workload(facts=SMOLLM2.ref.facts, labelled=0.75, dtype="float32", optim="adamw_torch", device="cpu")


@pytest.mark.parametrize(
    ("work", "gigabytes"),
    [
        (replace(CPU, length=256), 1.84),
        (replace(CPU, length=1024), 5.22),
        (replace(CPU, length=512, method="lora"), 3.07),
        (replace(CPU, length=256, micro_batch=4), 5.42),
        (replace(CPU, length=1024, dtype="bfloat16"), 3.08),
    ],
)
def test_resident_peaks_measured_on_a_cpu_are_met_within_20_percent(work: Workload, gigabytes: float) -> None:
    assert estimate(work).total == pytest.approx(gigabytes * GB, rel=0.2)


def measured(ratio: float, *, base: str = "m", tokens: int = 512) -> Measurement:
    return Measurement(base=base, method="qlora", tokens=tokens, predicted=10 * GB, measured=int(ratio * 10 * GB))


def test_nothing_measured_leaves_the_formula_and_a_wide_margin() -> None:
    assert calibrate([measured(1.5, base="other")], base="m", method="qlora", tokens=512) == Calibration()
    assert "formula alone" in Calibration().sure


def test_measurements_pull_the_estimate_to_themselves_and_narrow_its_margin() -> None:
    few, many = (calibrate([measured(1.2)] * count, base="m", method="qlora", tokens=512) for count in (1, 10))
    assert 1.0 < few.factor < many.factor <= 1.2001
    assert many.factor == pytest.approx(1.2, rel=0.01)
    assert many.spread < few.spread < Calibration().spread
    assert many.expected(10 * GB) <= many.upper(10 * GB) < Calibration().upper(12 * GB)


def test_jobs_of_another_length_count_less_than_those_of_the_same() -> None:
    near = calibrate([measured(1.3)] * 2, base="m", method="qlora", tokens=500)
    far = calibrate([measured(1.3, tokens=4096)] * 2, base="m", method="qlora", tokens=500)
    assert 1.0 < far.factor < near.factor
    assert far.spread > near.spread


def test_scattered_measurements_are_trusted_less() -> None:
    calm = calibrate([measured(1.1)] * 4, base="m", method="qlora", tokens=512)
    wild = calibrate([measured(ratio) for ratio in (0.8, 1.4, 0.9, 1.3)], base="m", method="qlora", tokens=512)
    assert wild.spread > calm.spread


def test_a_bucket_is_the_next_power_of_two() -> None:
    assert [bucket(tokens) for tokens in (1, 2, 3, 512, 513)] == [1, 2, 4, 512, 1024]


def test_the_page_of_models_says_what_the_estimator_does() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")

    for row in memory_by_method.rows():
        assert f"{row}\n" in page, "run python -m bench.memory_by_method"
    for model in memory_by_method.MODELS:
        assert f'[models."{model.name}"]\nsource = "hub"\nrepository = "{model.repository}"\n' in page
