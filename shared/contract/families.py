"""Facts about families of base models that no config.json holds, by `model_type`.

Seen in transformers 5.23; `tests/train/test_attention.py` reads the installed sources again.
"""

from __future__ import annotations

from typing import Final

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
