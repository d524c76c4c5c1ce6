"""A model's shape as metadata of a GGUF file, under llama.cpp's names.

Source: llama.cpp's `convert_hf_to_gguf.py`, `TextModel.set_gguf_parameters` and the classes of each architecture.
"""

from __future__ import annotations

import math
from typing import Any, Final

import gguf
import torch

from shared.contract.gguf_formats import ARCHITECTURES
from shared.errors import Invalid

# Of granite: what its config calls these, and how they are written.
_GRANITE: Final = {
    "attention_multiplier": gguf.GGUFWriter.add_attention_scale,
    "embedding_multiplier": gguf.GGUFWriter.add_embedding_scale,
    "residual_multiplier": gguf.GGUFWriter.add_residual_scale,
    "logits_scaling": gguf.GGUFWriter.add_logit_scale,
}


def llama_cpp_name(config: Any) -> str:
    """Of the architecture. Raises Invalid: `architecture_not_exported`."""
    name = (config.architectures or ["of no name"])[0]
    if name not in ARCHITECTURES:
        raise Invalid(
            f"Models of {name} are not exported; {', '.join(ARCHITECTURES)} are.",
            code="architecture_not_exported",
            param="adapter",
        )
    return ARCHITECTURES[name]


def write_figures(writer: gguf.GGUFWriter, config: Any, *, architecture: str) -> None:
    """Add the metadata of a model with this transformers config. Raises Invalid: `architecture_not_exported`."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "granite":
        for name, add in _GRANITE.items():
            add(writer, getattr(config, name))
    _write_rope(writer, config)


def _context(config: Any) -> int:
    """Tokens up to which the file answers as the model does. llama.cpp's code for these has no sliding window."""
    window = getattr(config, "sliding_window", None)
    slides = window is not None and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if slides else int(config.max_position_embeddings)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in {"default", "llama3"} or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Invalid(
            f"This model turns positions in a way ({kind}) that the export does not write. Merge the model (POST "
            "/v1/tunepool/merges) and convert it with llama.cpp's convert_hf_to_gguf.py.",
            code="architecture_not_exported",
            param="adapter",
        )


def rope_factors(config: Any) -> torch.Tensor | None:
    """By how much each frequency of Llama 3.1 is slowed down, `[head_dim / 2]` float32; None: not at all."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    lowest, highest, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    length = rope["original_max_position_embeddings"]
    factors = []
    for frequency in plain.tolist():
        wave = 2 * math.pi / frequency
        if wave < length / highest:
            factors.append(1.0)
        elif wave > length / lowest:
            factors.append(float(factor))
        else:
            smooth = (length / wave - lowest) / (highest - lowest)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
