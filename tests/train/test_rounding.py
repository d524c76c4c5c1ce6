"""Weights rounded to 4 bits in place are bitsandbytes' own, bit by bit, in the layers that it would quantise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM

from shared.contract.spec import Dtype, Quantization
from tests.train.families import make_family
from worker.train.base_model import TORCH_DTYPES, four_bit, keep_training_layout
from worker.train.rounding import _PIECE, round_to_4_bits, rounded_to_4_bits, stored_in_4_bits


def config(kind: Literal["nf4", "fp4"] = "nf4", *, double: bool = True) -> Any:
    quantization = Quantization(
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype="float32"
    )
    return four_bit(quantization)


def by_bitsandbytes(weight: torch.Tensor, kind: str, *, double: bool) -> torch.Tensor:
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double))


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    blocks = torch.randn(_PIECE + 70, 64)
    codes = functional.get_4bit_type("nf4", device="cpu").sort().values
    on_bounds = torch.cat([codes, (codes[:-1] + codes[1:]) / 2, torch.ones(33)])[None].repeat(64, 1)
    return {
        "more than a piece": (blocks * 0.02).to(dtype),
        "codes and bounds between them": on_bounds.to(dtype),
        "zeros": torch.zeros(64, 64, dtype=dtype),
        "tiny": (torch.randn(64, 64) * 1e-6).to(dtype),
        "one that stands out": torch.cat([torch.randn(64, 63), torch.full((64, 1), 900.0)], dim=1).to(dtype),
        "a short last block": torch.randn(33, 5).to(dtype),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_value_is_the_one_that_bitsandbytes_reads(
    kind: Literal["nf4", "fp4"], double: bool, dtype: Dtype
) -> None:
    for name, weight in weights(TORCH_DTYPES[dtype]).items():
        ours = rounded_to_4_bits(weight, config(kind, double=double))

        assert ours.dtype == weight.dtype
        assert torch.equal(ours, by_bitsandbytes(weight, kind, double=double)), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3", "falcon_h1"])
def test_a_rounded_model_computes_what_its_4_bit_form_does(tmp_path: Path, family: str) -> None:
    base = make_family(tmp_path, family, initializer_range=0.3)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    quantised = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config(), device_map={"": "cpu"}
    ).eval()
    keep_training_layout(quantised)  # the inference layout rounds to bfloat16
    packed = {path for path, module in quantised.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}

    round_to_4_bits(plain, config())

    assert {f"{path}.weight" for path in packed} == set(stored_in_4_bits(plain, config()))
    changed = {
        name.removesuffix(".weight") for name, tensor in plain.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed == packed
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, quantised(ids).logits, atol=2e-3, rtol=2e-3)
