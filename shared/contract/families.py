"""Facts about families of base models that no config.json holds, by `model_type` or the name of the class.

The only place that knows families by name, for the API, the planner and the trainer; `tests/unit/test_families.py`
holds everybody else to it. What a class or a loaded model says of itself is asked of it instead: its attention
(worker/train/attention.py), its layers and experts (worker/train/targets.py), its template (template_abilities.py).

Seen in transformers 5.23; `tests/train/test_attention.py` reads the installed sources again. Names of modules are those
of `models/*/modeling_*.py`, except QWenLMHeadModel (Qwen, first generation), whose code never entered transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

# Their causal mask is built without positions (`create_causal_mask` in their modeling files), so that a packed row sees
# the rows before it.
BLIND_TO_POSITIONS: Final = frozenset(
    {
        *("afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "granitemoehybrid", "mpt", "openai-gpt", "opt", "xglm"),
        # Encoders that can be asked to write.
        *(
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "camembert",
        ),
        *(
            "data2vec-text",
            "electra",
            "ernie",
            "marian",
            "mbart",
            "megatron-bert",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
        ),
        *(
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "trocr",
            "xlm",
            "xlm-roberta",
        ),
        *("xlm-roberta-xl", "xlnet", "xmod", "cpmant", "git", "got_ocr2", "fuyu", "musicgen", "musicgen_melody"),
    }
)

# Names of families or classes whose layers carry state along the sequence: packed rows would leak into each other.
CARRY_STATE: Final = re.compile(
    r"mamba|rwkv|recurrent|lstm|lfm|bamba|jamba|zamba|zaya|falcon_?h1|nemotron_?h|qwen3_?next|qwen3_?5|qwen4|kimi_?linear"
    r"|granite_?moe_?hybrid|olmo_?hybrid|bailing_?hybrid|inkling|hybrid|retnet|hyena",
    re.IGNORECASE,
)
# Classes of single modules that do.
CARRYING_CLASSES: Final = re.compile(
    r"Mamba|SSM|StateSpace|R[Ww][Kk][Vv]|Recurrent|R[Gg][Ll][Rr][Uu]|LSTM|GRU|Delta(Net|Attention|Rule)|ShortConv"
    r"|LinearAttention|LightningAttention|Retention|Hyena"
)
# Kinds of layers that keep packed rows apart, under their names of today and of older configs. Only these: of a kind
# that is new to us nothing is known.
APART: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "moe", "mlp"})

# How such layers compute along the sequence, by the name of the model's class.
Scan = Literal["delta_rule", "mamba2", "mamba"]
_SCANS: Final[tuple[tuple[Scan, re.Pattern[str]], ...]] = (
    ("delta_rule", re.compile(r"^(Qwen3_5|Qwen3Next|OlmoHybrid|KimiLinear)")),
    ("mamba2", re.compile(r"^(GraniteMoeHybrid|Bamba|FalconH1|NemotronH|Zamba2|Mamba2)")),
    ("mamba", re.compile(r"Mamba|Jamba|Zamba")),
)


def scan_of(architecture: str) -> Scan | None:
    """How its layers carry state; None for those that do not, and for short convolutions."""
    return next((scan for scan, names in _SCANS if names.search(architecture)), None)


# Families whose embedding and output layer are one where config.json does not say so.
_TIED_WHERE_UNSAID: Final = ("gemma",)


def tied_where_unsaid(model_type: str) -> bool:
    return model_type.startswith(_TIED_WHERE_UNSAID)


# Linear layers that PEFT 0.21 adapts in no model of the type (`tuners_utils.py`, `_check_lora_target_modules_mamba`):
# fused kernels of a state space read their weights past the layer.
NEVER_ADAPTED: Final[dict[str, frozenset[str]]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"out_proj"})
)

# Architectures that cannot stand on a 4-bit base: their scan reads `dt_proj.weight` itself, not through its layer.
WHOLE_ONLY: Final = frozenset({"MambaForCausalLM", "FalconMambaForCausalLM"})
WHOLE_ONLY_REASON: Final = "the scan of this family reads weights past their layer, which 4-bit weights do not allow"

# Architectures that halve some weights in place whenever they are asked, and undo it to train: an adapter beside them
# is not halved, so that answers, losses of validation and merges are not those of what was trained.
HALVED: Final = frozenset({"RwkvForCausalLM"})

# Families whose activations are known to leave float16's range (65,504), by the start of their classes' names.
_BEYOND_FLOAT16: Final = ("Gemma", "RecurrentGemma", "VaultGemma", "Qwen2", "Qwen3", "Qwen4", "GptOss")


def leaves_float16(architecture: str) -> bool:
    """Whether a base of this class is not computed in float16: on GPUs without bfloat16 it takes float32."""
    return architecture.startswith(_BEYOND_FLOAT16)


# Wrappers of a language model that transformers' causal class takes (MODEL_FOR_CAUSAL_LM_MAPPING, 5.23); no other one.
CAUSAL_WRAPPERS: Final = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        *("Dots3Note", "Emu3", "Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified", "GotOcr2", "Llama4", "Mllama"),
        *("MossTranscribeDiarize", "Qwen3_5", "Qwen3_5Moe", "Qwen4Exp"),
    )
)

HOW_TO_ADAPT_EXPERTS: Final = "target_modules 'experts' adapts them too, with an adapter that is many times as large."


def frozen_experts(values: int) -> str:
    """What is said of a base whose experts are not adapted; `values` are those of all experts."""
    return f"The experts stay frozen, {values / 1e9:.3g} billion values: the adapter works on the layers beside them."


# How weights are published that transformers expands to 16 bits as it loads them, by `quant_method` of config.json.
EXPANDABLE: Final = ("mxfp4", "fp8")


# Which linear modules each known architecture has; an unknown one is inspected by the trainer.
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

USUAL = _LLAMA  # of an architecture that nobody listed
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
