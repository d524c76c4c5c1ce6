"""What is told and refused beforehand of mixtures of experts, of wrappers, and of bases in fewer than 16 bits."""

from __future__ import annotations

from typing import Any

import pytest

from shared.contract.base_facts import ModelFacts
from shared.contract.job_request import CreateJob
from shared.contract.spec import Adapter, BaseModelRef, DataFacts, JobSpec, Quantization
from shared.errors import Invalid
from shared.settle.calibration import Calibration
from shared.settle.catalogue import SMOLLM2
from shared.settle.cautions import cautions
from shared.settle.expert_sizes import expert_adapter, expert_parameters
from shared.settle.memory_fit import peak
from shared.settle.model_facts import facts_of
from shared.settle.refusals import check_request
from shared.settle.resolve import resolve
from shared.settle.settling import DeviceFacts
from shared.settle.sizing import Workload, estimate
from shared.settle.workload import workload
from tests.factories import make_spec

# As published; only what sizes are reckoned from.
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "vocab_size": 201088,
}


def base(config: dict[str, Any]) -> BaseModelRef:
    return SMOLLM2.ref.model_copy(update={"name": "base", "facts": facts_of(config, name="base")})


def asked(**parts: Any) -> CreateJob:
    return CreateJob.model_validate({"model": "base", "training_file": "file-a", "tunepool": parts})


def settled(config: dict[str, Any], **adapter: Any) -> JobSpec:
    return make_spec().model_copy(update={"base_model": base(config), "adapter": Adapter(**adapter)})


def test_experts_are_counted_apart_and_stay_in_16_bits_on_a_4_bit_base() -> None:
    facts = base(QWEN3_30B).facts

    terms = estimate(Workload(facts=facts, method="qlora")).terms

    assert expert_parameters(facts) == 48 * 128 * 3 * 2048 * 768
    assert terms["experts in 16 bits"] == 2 * expert_parameters(facts)
    spread = estimate(Workload(facts=facts, method="qlora", shards=8)).terms
    assert spread["experts in 16 bits"] == terms["experts in 16 bits"] / 8, "frozen: they do not stay whole"
    assert terms["weights"] < 2e9  # attention in 4 bits, embeddings in 16


def test_experts_whose_width_is_that_of_the_model_do_not_hide_its_attention() -> None:
    work = Workload(facts=base(GPT_OSS_20B).facts, method="lora", r=16)
    assert estimate(work).terms["trained weights"] == 4 * 24 * 16 * (2 * (2880 + 64 * 64) + 2 * (2880 + 8 * 64))


def test_an_adapter_on_every_expert_is_told_by_its_size_and_by_what_each_pass_writes() -> None:
    facts = base(QWEN3_30B).facts
    plain, whole = (Workload(facts=facts, target_modules=targets) for targets in ("all-linear", "experts"))

    more = estimate(whole).terms["trained weights"] - estimate(plain).terms["trained weights"]

    assert more == 4 * expert_adapter(facts, r=16) == 4 * 48 * 128 * 16 * (2 * 2048 + 3 * 768)
    written = estimate(whole).terms["adapted experts"]
    assert written == 2 * expert_parameters(facts) // 48 * 49
    assert "adapted experts" not in estimate(plain).terms


def test_a_preflight_warns_of_frozen_experts_and_of_their_16_bits() -> None:
    said = cautions(settled(QWEN3_30B, method="qlora"))

    assert said[0].startswith("The experts stay in 16 bits, 54.0 GiB")
    assert said[1].startswith("The experts stay frozen, 29 billion values")
    assert "target_modules 'experts'" in said[1]


def test_a_preflight_tells_the_size_of_an_adapter_on_experts() -> None:
    (said,) = cautions(settled(QWEN3_30B, method="lora", target_modules="experts"))

    assert "629 million trained values of rank 16" in said


def test_a_preflight_says_that_a_tower_stays_frozen() -> None:
    text = {key: value for key, value in QWEN3_30B.items() if "expert" not in key and "moe" not in key}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"depth": 2}}

    assert cautions(settled(config, method="lora")) == [
        "Only the language model is trained; the parts for vision stay as they are."
    ]
    assert cautions(make_spec()) == []


@pytest.mark.parametrize(
    ("parts", "param", "remedy"),
    [
        ({}, "adapter.method", "use method lora with tunepool.quantization.dequantize true"),
        ({"adapter": {"method": "lora"}}, "quantization.dequantize", "set it to true"),
        ({"adapter": {"method": "qdora"}, "quantization": {"dequantize": True}}, "adapter.method", "use method dora"),
    ],
)
def test_a_base_in_mxfp4_is_refused_until_it_is_to_be_expanded(parts: Any, param: str, remedy: str) -> None:
    with pytest.raises(Invalid, match=remedy) as refused:
        check_request(asked(**parts), base(GPT_OSS_20B))
    assert refused.value.param == f"tunepool.{param}"
    check_request(asked(adapter={"method": "lora"}, quantization={"dequantize": True}), base(GPT_OSS_20B))
    check_request(asked(adapter={"method": "full"}, quantization={"dequantize": True}), base(GPT_OSS_20B))


def test_a_base_in_a_format_that_does_not_train_is_refused_by_its_name() -> None:
    awq = {**QWEN3_30B, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(Invalid, match="published as awq, which does not train"):
        check_request(asked(adapter={"method": "lora"}), base(awq))


def test_expanding_is_refused_where_nothing_is_packed() -> None:
    with pytest.raises(Invalid, match="is not published in mxfp4 or fp8"):
        check_request(asked(adapter={"method": "lora"}, quantization={"dequantize": True}), base(QWEN3_30B))


def test_experts_of_a_dense_base_are_refused() -> None:
    with pytest.raises(Invalid, match="has no experts"):
        check_request(asked(adapter={"target_modules": "experts"}), SMOLLM2.ref)


def test_a_wrapper_without_a_causal_class_is_refused_by_its_name() -> None:
    mistral = {**QWEN3_30B, "architectures": ["Mistral3ForConditionalGeneration"]}
    with pytest.raises(Invalid, match="Mistral3ForConditionalGeneration has no class") as refused:
        check_request(asked(), base(mistral))
    assert refused.value.param == "model"
    check_request(asked(), base({**QWEN3_30B, "architectures": ["Gemma3ForConditionalGeneration"]}))


def test_a_class_that_halves_its_weights_while_it_is_asked_is_refused_by_its_name() -> None:
    with pytest.raises(Invalid, match="RwkvForCausalLM halves weights in place") as refused:
        check_request(asked(), base({**QWEN3_30B, "architectures": ["RwkvForCausalLM"]}))
    assert refused.value.param == "model"


def test_mamba_is_refused_in_4_bits_and_taken_in_16() -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}
    mamba = base({**config, "vocab_size": 260, "state_size": 16})

    with pytest.raises(Invalid, match="use method lora"):
        check_request(asked(), mamba)
    check_request(asked(adapter={"method": "lora"}), mamba)


def test_float16_is_refused_for_a_base_that_leaves_its_range() -> None:
    with pytest.raises(Invalid, match="leave float16's range") as refused:
        check_request(asked(training={"dtype": "float16"}), base(QWEN3_30B))
    assert refused.value.param == "tunepool.training.dtype"
    check_request(asked(training={"dtype": "float32"}), base(QWEN3_30B))
    check_request(asked(training={"dtype": "float16"}), SMOLLM2.ref)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora"},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"init_lora_weights": "eva"},
        {"layers_to_transform": [0]},
    ],
)
def test_what_upstream_cannot_do_with_experts_is_refused_at_submit(adapter: dict[str, Any]) -> None:
    check_request(asked(adapter={"target_modules": "experts"}), base(QWEN3_30B))
    with pytest.raises(Invalid):
        check_request(asked(adapter={"target_modules": "experts", **adapter}), base(QWEN3_30B))


def test_a_settled_job_says_whether_its_base_is_expanded() -> None:
    assert Quantization().dequantize is False
    job = settled(GPT_OSS_20B, method="lora").model_copy(update={"quantization": Quantization(dequantize=True)})
    assert any("published in mxfp4 and is expanded" in said for said in cautions(job))


def seen(config: dict[str, Any], stacked: int) -> ModelFacts:
    """Facts with the stacks that the model is built with."""
    facts = facts_of(config, name="base")
    assert facts.experts is not None
    return facts.model_copy(update={"experts": facts.experts.model_copy(update={"stacked": stacked})})


STACKED = 48 * 128 * 3 * 2048 * 768
QWEN3_30B_SEEN = seen(QWEN3_30B, STACKED)


@pytest.mark.parametrize(("gigabytes", "packed"), [(24, True), (80, False)])
def test_experts_go_into_4_bits_where_16_do_not_fit(gigabytes: int, packed: bool) -> None:
    ref = base(QWEN3_30B).model_copy(update={"facts": QWEN3_30B_SEEN})
    rows = DataFacts(format="chat", train_rows=2000, mean_characters=800.0, max_characters=4000)
    size = gigabytes * 2**30
    device = DeviceFacts("cuda", total_bytes=size, free_bytes=size - 2**29, bfloat16=True)

    settled = resolve(asked(), base=ref, data=rows, device=device, seed=1)

    spec = settled.spec
    assert spec.quantization.load_experts_in_4bit is packed
    work = workload(spec, device="cuda", memory=device.total_bytes)
    terms = peak(work).terms
    assert ("experts in 4 bits" in terms) is packed
    assert Calibration().upper(peak(work).total) <= device.budget
    assert spec.training.gradient_checkpointing or not packed
    assert spec.training.max_length >= 2048, "no row was shortened for it"


def test_packed_experts_that_are_not_recomputed_are_reckoned_expanded_in_every_layer() -> None:
    kept, again = (
        estimate(Workload(facts=QWEN3_30B_SEEN, packed_experts=True, gradient_checkpointing=recompute)).terms
        for recompute in (False, True)
    )

    assert kept["expanded experts"] == 2 * STACKED == 48 * again["expanded experts"]


@pytest.mark.parametrize(
    ("facts", "parts", "why"),
    [
        (QWEN3_30B_SEEN, {"adapter": {"target_modules": "experts"}}, "added to experts in 16 bits"),
        (QWEN3_30B_SEEN, {"placement": {"strategy": "fsdp", "gpus": 2}}, "fsdp spreads experts as they are published"),
        (QWEN3_30B_SEEN, {"adapter": {"method": "lora"}}, "does not quantise its base"),
        (base(QWEN3_30B).facts, {}, "no stacks of experts that were seen"),
        (SMOLLM2.ref.facts, {}, "no stacks of experts that were seen"),
    ],
)
def test_packed_experts_are_refused_by_name_where_they_cannot_be(
    facts: ModelFacts, parts: dict[str, Any], why: str
) -> None:
    ref = base(QWEN3_30B).model_copy(update={"facts": facts})

    with pytest.raises(Invalid, match=why) as refused:
        check_request(asked(quantization={"load_experts_in_4bit": True}, **parts), ref)

    assert refused.value.param == "tunepool.quantization.load_experts_in_4bit"
