"""Tiny random models of other families than the ring's Llama, made from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from transformers import (
    ApertusConfig,
    ArceeConfig,
    BambaConfig,
    BitNetConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FalconConfig,
    FalconH1Config,
    FalconMambaConfig,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    JambaConfig,
    JetMoeConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OlmoHybridConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    Zamba2Config,
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
_NO_DROPOUT: Final = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_CHOSEN: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LINEAR: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION: Final = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_HYBRID_QWEN: Final = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, **_LINEAR}
_ROUTED: Final = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_LATENT: Final = {
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_MAMBA: Final = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}

_GEMMA4: Final = {
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 16,
}

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
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128, **_NO_DROPOUT}),
    "starcoder2": (Starcoder2Config, {}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "gemma4_text": (Gemma4TextConfig, dict(_GEMMA4)),
    "ministral3": (Ministral3Config, {"head_dim": 16}),
    "phi": (PhiConfig, {}),
    "olmo3": (Olmo3Config, {"sliding_window": 64}),
    "ernie4_5": (Ernie4_5Config, {"head_dim": 16}),
    "seed_oss": (SeedOssConfig, {"head_dim": 16, "residual_dropout": 0.0, "attention_dropout": 0.0}),
    "exaone4": (Exaone4Config, {"sliding_window": 64}),
    "stablelm": (StableLmConfig, {}),
    "hunyuan_v1_dense": (HunYuanDenseV1Config, {"head_dim": 16}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "falcon": (FalconConfig, {"ffn_hidden_size": 128}),
    "llama4_text": (
        Llama4TextConfig,
        {"head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 64, "num_local_experts": 4},
    ),
    "glm4_moe": (Glm4MoeConfig, {"head_dim": 16, **_ROUTED}),
    "deepseek_v2": (DeepseekV2Config, {**_ROUTED, **_LATENT, "n_shared_experts": 1}),
    "deepseek_v3": (DeepseekV3Config, {**_ROUTED, **_LATENT}),
    "deepseek_v32": (
        DeepseekV32Config,
        {**_ROUTED, **_LATENT, "n_shared_experts": 1, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "minimax_m2": (MiniMaxM2Config, {"head_dim": 16, **_EXPERTS}),
    "falcon_h1": (FalconH1Config, {"head_dim": 16, "mamba_d_ssm": 128, **_MAMBA}),
    "bamba": (BambaConfig, {"attn_layer_indices": [1], **_MAMBA}),
    "jamba": (
        JambaConfig,
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
        },
    ),
    "nemotron_h": (
        NemotronHConfig,
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "mamba": (MambaConfig, {"state_size": 16, "time_step_rank": 8}),
    "mamba2": (
        Mamba2Config,
        {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_mamba": (FalconMambaConfig, {"state_size": 16, "time_step_rank": 8}),
    "cohere2": (Cohere2Config, {"sliding_window": 64}),
    "smollm3": (SmolLM3Config, {}),
    "apertus": (ApertusConfig, {}),
    "arcee": (ArceeConfig, {}),
    "bitnet": (BitNetConfig, {}),
    "cohere": (CohereConfig, {}),
    "dots1": (Dots1Config, {"head_dim": 16, **_ROUTED, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}),
    "exaone_moe": (ExaoneMoeConfig, {"head_dim": 16, "num_experts": 4, **_CHOSEN}),
    "flex_olmo": (FlexOlmoConfig, {"num_experts": 4, **_CHOSEN}),
    "glm": (GlmConfig, {"head_dim": 16}),
    "glm4_moe_lite": (Glm4MoeLiteConfig, {**_ROUTED, **_LATENT}),
    "granitemoe": (GraniteMoeConfig, dict(_EXPERTS)),
    "helium": (HeliumConfig, {"head_dim": 16}),
    "hunyuan_v1_moe": (HunYuanMoEV1Config, {"head_dim": 16, "num_experts": 4, **_CHOSEN}),
    "jetmoe": (JetMoeConfig, {"kv_channels": 16, **_EXPERTS}),
    "lfm2_moe": (Lfm2MoeConfig, {"layer_types": ["conv", "full_attention"], "num_experts": 4, **_CHOSEN}),
    "minimax": (MiniMaxConfig, {"head_dim": 16, **_EXPERTS}),
    "nemotron": (NemotronConfig, {}),
    "olmo": (OlmoConfig, {}),
    "olmo_hybrid": (OlmoHybridConfig, {}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, **_CHOSEN}),
    "opt": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phimoe": (PhimoeConfig, dict(_EXPERTS)),
    "qwen2_moe": (Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 64, **_CHOSEN}),
    "zamba2": (
        Zamba2Config,
        {
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "chunk_size": 16,
            "mamba_ngroups": 1,
            "use_mem_rope": True,
            "num_mem_blocks": 1,
        },
    ),
}


# Language models beside a tower for images: (config, text part, further parts).
WRAPPERS: Final[dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]] = {
    "gemma3": (
        Gemma3Config,
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
        {"vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 259},
    ),
    "gemma4": (Gemma4Config, dict(_GEMMA4), {}),
    "qwen3_5": (Qwen3_5Config, dict(_HYBRID_QWEN), {"vision_config": _QWEN_VISION}),
    "qwen3_5_moe": (
        Qwen3_5MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            **_HYBRID_QWEN,
        },
        {"vision_config": _QWEN_VISION},
    ),
}


def make_config(name: str, **settings: Any) -> Any:
    """A config of the family, small."""
    tokenizer = make_tokenizer()
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name in WRAPPERS:
        config, text, parts = WRAPPERS[name]
        return config(text_config=_SIZES | special | text | settings, **parts)
    config, sizes = FAMILIES[name]
    return config(**(_SIZES | special | sizes | settings))


def make_family(folder: Path, name: str, **settings: Any) -> Path:
    """A directory with a random model of the family."""
    return make_model_directory(folder / name, make_config(name, **settings))
