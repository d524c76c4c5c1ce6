"""Weights rounded to 4 bits and expanded again where they are, as bitsandbytes stores and reads them, bit by bit.

bitsandbytes 0.50 quantises some 16 million values a second on a CPU core: 7 minutes for 8 billion. A merge needs no
packed form, only the values, and the values in the same order of operations. A pass over a piece of the weights here
counts how many bounds between codes each value exceeds, which vectorises; a search for its place does not.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

_BLOCK: Final = 64  # values that share a scale: bitsandbytes' own default
_PIECE: Final = 4096  # blocks worked on at a time: they stay in a core's cache
_LEAST: Final = 1e-38  # bitsandbytes divides by no smaller scale
QuantType = Literal["nf4", "fp4"]


@torch.no_grad()
def round_to_4_bits(model: Any, config: BitsAndBytesConfig) -> None:
    """Round, in place, every weight that bitsandbytes would store in 4 bits if `model` were loaded with `config`."""
    for path in stored_in_4_bits(model, config):
        weight = model.get_parameter(path)
        # Conv1D (GPT-2) keeps its weights transposed; upstream turns them before it quantises.
        turned = type(model.get_submodule(path.rpartition(".")[0])).__name__ == "Conv1D"
        rounded = rounded_to_4_bits(weight.T.contiguous() if turned else weight, config)
        weight.copy_(rounded.T if turned else rounded)


def stored_in_4_bits(model: Any, config: BitsAndBytesConfig) -> list[str]:
    """Names of the weights that would be quantised: a second model without memory is made ready for it, and asked."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
    quantizer = AutoHfQuantizer.from_config(config)
    quantizer.preprocess_model(twin, device_map={"": "cpu"})
    return [name for name, _ in twin.named_parameters() if quantizer.param_needs_quantization(twin, name)]


def rounded_to_4_bits(weight: torch.Tensor, config: BitsAndBytesConfig) -> torch.Tensor:
    """`dequantize_4bit(quantize_4bit(weight))` of bitsandbytes, in the type of `weight`."""
    kind, double = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    if weight.numel() % _BLOCK:  # a short last block is divided in another way there; such layers are small
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        return functional.dequantize_4bit(packed, state)
    blocks = weight.reshape(-1, _BLOCK)
    exact = torch.cat([piece.float().abs().amax(dim=1) for piece in blocks.split(_PIECE)])
    scales = _as_stored(exact) if double else exact
    pieces = zip(*(tensor.split(_PIECE) for tensor in (blocks, exact, scales)), strict=True)
    return torch.cat([_rounded(piece, *both, kind=kind) for piece, *both in pieces]).view_as(weight)


def _as_stored(scales: torch.Tensor) -> torch.Tensor:
    """The scales as double quantization keeps them: in 8 bits around their mean."""
    mean = scales.mean()
    packed, state = functional.quantize_blockwise(scales - mean, blocksize=256)
    return functional.dequantize_blockwise(packed, state) + mean


def _rounded(piece: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, *, kind: QuantType) -> torch.Tensor:
    """Each value of some blocks as its code times the scale of its block."""
    codes, bounds = _codes(kind)
    parts = (piece.float() * (1.0 / exact.clamp(min=_LEAST))[:, None]).clamp_(-1, 1)
    exceeded = torch.zeros(parts.shape, dtype=torch.uint8)
    for bound in bounds:
        exceeded += parts > bound
    return codes[exceeded.int()].mul_(scale[:, None]).to(piece.dtype)


@cache
def _codes(kind: QuantType) -> tuple[torch.Tensor, list[float]]:
    """The values of the 4-bit type in ascending order, and the bounds between them."""
    codes = functional.get_4bit_type(kind, device="cpu").sort().values
    return codes, ((codes[:-1] + codes[1:]) / 2).tolist()
