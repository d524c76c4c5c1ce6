"""Whether a base carries state along the sequence, from config.json as families publish it."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import Invalid
from shared.settle.catalogue import facts_of
from shared.settle.refusals import check_request
from shared.settle.scans import scan_bytes
from shared.settle.sequence_state import carried_state
from tests.unit.test_resolve import LLAMA_8B, settled
from tests.unit.test_resolve_refusals import base, request, training

CARRYING: dict[str, dict[str, Any]] = {
    "granite 4": {"model_type": "granitemoehybrid", "layer_types": ["mamba", "mamba", "attention"]},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "lfm2, first releases": {"model_type": "lfm2", "full_attn_idxs": [2, 5], "conv_L_cache": 3},
    "nemotron-h": {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M*-", "ssm_state_size": 128},
    "nemotron-h, listed": {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention"]},
    "bamba": {"model_type": "bamba", "attn_layer_indices": [9], "mamba_d_state": 128},
    "jamba": {"model_type": "jamba", "attn_layer_period": 8, "mamba_d_conv": 4},
    "falcon h1": {"model_type": "falcon_h1", "mamba_d_ssm": 1536},
    "qwen3-next": {"model_type": "qwen3_next", "full_attention_interval": 4, "linear_conv_kernel_dim": 4},
    "qwen3.5, nested": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
    },
    "recurrent gemma": {"model_type": "recurrent_gemma", "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba 2": {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]},
    "gpt-oss": {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]},
    "granite 4 without mamba": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention", "attention"],
        "mamba_d_state": 128,
    },
    "falcon, blind to positions": {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
    "a family of tomorrow": {"model_type": "tomorrow", "layer_types": ["full_attention", "resonance"]},
    "a family of tomorrow, by its sizes": {"model_type": "tomorrow", "mamba_d_state": 64},
}
ATTENDING: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "gemma 3": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "llama 4": {"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention"]},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 128, "mlp_only_layers": [], "sliding_window": None},
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 260}


@pytest.mark.parametrize("name", CARRYING)
def test_a_family_that_carries_state_is_known_by_its_config(name: str) -> None:
    assert carried_state(CARRYING[name])


@pytest.mark.parametrize("name", ATTENDING)
def test_a_family_that_only_attends_may_be_packed(name: str) -> None:
    assert carried_state(ATTENDING[name]) is None


def test_the_catalogue_takes_the_fact_from_the_config() -> None:
    config = {**SIZES, "architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv", "full_attention"]}

    assert facts_of(config, name="m").carries_state == "conv"
    assert facts_of({**config, "layer_types": ["full_attention"] * 2}, name="m").carries_state is None


def test_packing_is_off_with_its_reason_where_the_base_carries_state() -> None:
    job = settled(facts=LLAMA_8B.model_copy(update={"carries_state": "mamba"}))

    assert settled().spec.training.packing is True
    assert job.spec.training.packing is False
    reason = next(one.reason for one in job.auto if one.field == "training.packing")
    assert reason == "packed rows would leak into each other through this base's mamba layers"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (training(packing=True), "tunepool.training.packing"),
        (request(hyperparameters={"packing": True}), "hyperparameters.packing"),
    ],
)
def test_packing_asked_for_is_refused_at_submit_where_the_base_carries_state(asked: Any, param: str) -> None:
    with pytest.raises(
        Invalid, match=r"is true, but packed rows would leak .* conv layers .* use packing false"
    ) as refused:
        check_request(asked, base(carries_state="conv"))
    assert refused.value.param == param
    check_request(asked, base())
    check_request(training(packing=False), base(carries_state="conv"))


def test_a_hybrid_of_a_family_that_is_blind_to_positions_is_told_from_one_of_attention_alone() -> None:
    """Granite 4 has both; only layers that carry state keep a scan in memory."""
    config = {**SIZES, "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid"}
    hybrid = facts_of({**config, "layer_types": ["mamba", "attention"]}, name="m")
    dense = facts_of({**config, "layer_types": ["attention", "attention"]}, name="m")

    assert (hybrid.carries_state, dense.carries_state) == ("mamba", "granitemoehybrid")
    assert scan_bytes(hybrid) == 280 * hybrid.hidden_size
    assert scan_bytes(dense) == 0
