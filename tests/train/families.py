"""Tiny random models of other families than the ring's Llama, made from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from tests.train.tiny import make_model_directory, make_tokenizer

_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA: Final = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}

FAMILIES: Final[dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "granitemoehybrid": (
        GraniteMoeHybridConfig,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 64,
            **(_MAMBA | _EXPERTS),
        },
    ),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}),
    "qwen3_next": (
        Qwen3NextConfig,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            **_LINEAR,
        },
    ),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        {"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "attention"], "head_dim": 16},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "mixtral": (MixtralConfig, dict(_EXPERTS)),
    "gpt_oss": (GptOssConfig, {"head_dim": 16, "sliding_window": 64, **_EXPERTS}),
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": 64}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3_text": (Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "phi3": (Phi3Config, {}),
    "granite": (GraniteConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "glm4": (Glm4Config, {"head_dim": 16}),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128}),
    "starcoder2": (Starcoder2Config, {}),
    "cohere2": (Cohere2Config, {"sliding_window": 64}),
    "smollm3": (SmolLM3Config, {}),
}


def make_family(folder: Path, name: str, **settings: Any) -> Path:
    """A directory with a random model of the family."""
    config, sizes = FAMILIES[name]
    tokenizer = make_tokenizer()
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return make_model_directory(folder / name, config(**(_SIZES | special | sizes | settings)))
