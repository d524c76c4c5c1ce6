"""Parameters as the headers of published weights list them: experts, packed forms, output layers stored or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.memory_by_method import GPT_OSS_20B, QWEN3_30B
from shared.errors import Invalid
from shared.settle.model_facts import facts_of, weights_of
from shared.settle.weights import tensors_in
from tests.unit.test_catalogue import GOOD

Listed = Iterator[tuple[str, tuple[str, list[int]]]]


def qwen3_30b() -> Listed:
    """What the 16 files of Qwen/Qwen3-30B-A3B list."""
    yield "model.embed_tokens.weight", ("BF16", [151936, 2048])
    yield "lm_head.weight", ("BF16", [151936, 2048])
    yield "model.norm.weight", ("BF16", [2048])
    for layer in range(48):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", ("BF16", [4096, 2048])
        yield f"{at}.self_attn.k_proj.weight", ("BF16", [512, 2048])
        yield f"{at}.self_attn.v_proj.weight", ("BF16", [512, 2048])
        yield f"{at}.self_attn.o_proj.weight", ("BF16", [2048, 4096])
        for norm, size in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128)):
            yield f"{at}.{norm}.weight", ("BF16", [size])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", ("BF16", [2048])
        yield f"{at}.mlp.gate.weight", ("BF16", [128, 2048])
        for expert in range(128):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", ("BF16", [768, 2048])
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", ("BF16", [768, 2048])
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", ("BF16", [2048, 768])


def gpt_oss_20b() -> Listed:
    """What the 3 files of openai/gpt-oss-20b list: experts in MXFP4, two numbers in a byte, a scale for 32 of them."""
    yield "model.embed_tokens.weight", ("BF16", [201088, 2880])
    yield "lm_head.weight", ("BF16", [201088, 2880])
    yield "model.norm.weight", ("BF16", [2880])
    for layer in range(24):
        at = f"model.layers.{layer}"
        for name, rows in (("q_proj", 4096), ("k_proj", 512), ("v_proj", 512)):
            yield f"{at}.self_attn.{name}.weight", ("BF16", [rows, 2880])
            yield f"{at}.self_attn.{name}.bias", ("BF16", [rows])
        yield f"{at}.self_attn.o_proj.weight", ("BF16", [2880, 4096])
        yield f"{at}.self_attn.o_proj.bias", ("BF16", [2880])
        yield f"{at}.self_attn.sinks", ("BF16", [64])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", ("BF16", [2880])
        yield f"{at}.mlp.router.weight", ("BF16", [32, 2880])
        yield f"{at}.mlp.router.bias", ("BF16", [32])
        for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            yield f"{at}.mlp.experts.{name}_blocks", ("U8", [32, rows, 90, 16])
            yield f"{at}.mlp.experts.{name}_scales", ("U8", [32, rows, 90])
            yield f"{at}.mlp.experts.{name}_bias", ("BF16", [32, rows])


MXFP4 = {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize(
    ("config", "listed", "total", "active", "stored_as"),
    [
        pytest.param(QWEN3_30B, qwen3_30b(), 30_532_122_624, 3.35e9, "bfloat16", id="qwen3-30b-a3b"),
        pytest.param(MXFP4, gpt_oss_20b(), 20_914_757_184, 4.19e9, "mxfp4", id="gpt-oss-20b"),
    ],
)
def test_parameters_of_published_mixtures_are_those_that_their_headers_list(
    config: dict[str, Any], listed: Listed, total: int, active: float, stored_as: str
) -> None:
    weights = weights_of(config, dict(listed), name="x")
    facts = facts_of(config, name="x", weights=weights)

    assert (facts.parameters, facts.stored_as) == (total, stored_as)
    assert facts.active_parameters == pytest.approx(active, rel=0.005)
    # Without headers they are reckoned: the check of that.
    assert facts_of(config, name="x").parameters == pytest.approx(total, rel=0.002)


PLAIN = {"model.embed_tokens.weight": ("BF16", [100, 64]), "model.layers.0.mlp.up.weight": ("BF16", [10, 64])}
HEAD = {"lm_head.weight": ("BF16", [100, 64])}


@pytest.mark.parametrize(
    ("config", "tensors", "tied", "parameters"),
    [
        ({}, PLAIN, True, 7040),
        ({}, PLAIN | HEAD, False, 13440),
        ({"tie_word_embeddings": True}, PLAIN | HEAD, True, 7040),
        ({"tie_word_embeddings": False}, PLAIN | HEAD, False, 13440),
    ],
)
def test_an_output_layer_is_one_with_the_embedding_or_stored_by_itself(
    config: dict[str, Any], tensors: dict[str, Any], tied: bool, parameters: int
) -> None:
    config = {**GOOD, **config}
    facts = facts_of(config, name="x", weights=weights_of(config, tensors, name="x"))

    assert (facts.tie_word_embeddings, facts.parameters) == (tied, parameters)


@pytest.mark.parametrize(
    ("quantised", "tensors", "parameters"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"a.qweight": ("I32", [8, 64]), "a.scales": ("F16", [1, 64])}, 4096),
        ({"quant_method": "gptq", "bits": 8}, {"a.qweight": ("I32", [8, 64]), "a.g_idx": ("I32", [64])}, 2048),
        ({"quant_method": "bitsandbytes"}, {"a.weight": ("U8", [50, 1]), "a.weight.absmax": ("F32", [9])}, 100),
        ({"quant_method": "fp8"}, {"a.weight": ("F8_E4M3", [50]), "a.weight_scale_inv": ("F32", [9])}, 50),
        ({}, {"model.layers.0.a": ("F32", [5]), "model.layers.2.a": ("F32", [7]), "mtp.b": ("F32", [3])}, 5),
    ],
)
def test_packed_numbers_count_and_what_is_not_loaded_does_not(
    quantised: dict[str, Any], tensors: dict[str, Any], parameters: int
) -> None:
    config = {**GOOD, "quantization_config": quantised}

    assert weights_of(config, tensors, name="x").parameters == parameters


@pytest.mark.parametrize("shape", [[-1], [1.5], ["3"], [True], [10**30], [0], [10**9, 10**9], [[1]]])
def test_a_shape_that_is_none_is_refused(shape: list[Any]) -> None:
    with pytest.raises(Invalid):
        weights_of(GOOD, {"a": ("F32", shape)}, name="x")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 20, (4).to_bytes(8, "little") + b"[1]x", (2).to_bytes(8, "little") + b"[]"],
)
def test_a_file_without_a_header_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(Invalid, match=r"model\.safetensors has a header"):
        tensors_in(tmp_path)


@pytest.mark.parametrize("names", [["../x.safetensors"], ["a\0"], ["none.safetensors"], [3], "text"])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, names: Any) -> None:
    index = {"weight_map": {str(at): name for at, name in enumerate(names)} if isinstance(names, list) else names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(Invalid, match=r"index\.json"):
        tensors_in(tmp_path)


def test_without_safetensors_nothing_is_said(tmp_path: Path) -> None:
    assert tensors_in(tmp_path) is None
