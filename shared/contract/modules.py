"""Which linear modules each known architecture has; an unknown one is inspected by the trainer.

Names are those of transformers 5.23 (`models/*/modeling_*.py`), except QWenLMHeadModel (Qwen, first generation), whose
code never entered transformers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Linear modules inside a decoder layer, and the modules that `modules_to_save` may name beside them."""

    linear: tuple[str, ...]
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    norms: tuple[str, ...] = ()
    gated_mlp: bool = True


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = Family(
    linear=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
)
_GEMMA = Family(
    linear=_LLAMA.linear,
    norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_FUSED_QKV = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "CohereForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "QWenLMHeadModel": Family(linear=("c_attn", "c_proj", "w1", "w2"), embedding="wte", norms=("ln_1", "ln_2", "ln_f")),
    "PhiForCausalLM": Family(
        linear=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        norms=("input_layernorm", "final_layernorm"),
        gated_mlp=False,
    ),
    "Phi3ForCausalLM": Family(linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), norms=_LLAMA.norms),
    "GPTNeoXForCausalLM": Family(
        linear=_FUSED_QKV,
        embedding="embed_in",
        norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        gated_mlp=False,
    ),
    "FalconForCausalLM": Family(
        linear=_FUSED_QKV,
        embedding="word_embeddings",
        norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp", "ln_f"),
        gated_mlp=False,
    ),
    "BloomForCausalLM": Family(
        linear=_FUSED_QKV,
        embedding="word_embeddings",
        norms=("input_layernorm", "post_attention_layernorm", "ln_f"),
        gated_mlp=False,
    ),
    "GPT2LMHeadModel": Family(
        linear=("c_attn", "c_proj", "c_fc"), embedding="wte", norms=("ln_1", "ln_2", "ln_f"), gated_mlp=False
    ),
    "GPTBigCodeForCausalLM": Family(
        linear=("c_attn", "c_proj", "c_fc"), embedding="wte", norms=("ln_1", "ln_2", "ln_f"), gated_mlp=False
    ),
    "GPTJForCausalLM": Family(
        linear=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        embedding="wte",
        norms=("ln_1", "ln_f"),
        gated_mlp=False,
    ),
    "OPTForCausalLM": Family(
        linear=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        gated_mlp=False,
    ),
    "Starcoder2ForCausalLM": Family(linear=(*_ATTENTION, "c_fc", "c_proj"), norms=_LLAMA.norms, gated_mlp=False),
}

# Modules that turn hidden states into logits, in any family: adapters there are never trained (TRL projects with the
# head's own weight).
HEADS = frozenset({"lm_head", "embed_out", "output_layer"})


def last(name: str) -> str:
    """The module's own name: `q_proj` of `model.layers.0.self_attn.q_proj`."""
    return name.rsplit(".", 1)[-1]
