"""What is exported as GGUF: which model classes, and in which number formats. Known before anything is loaded.

Sources: llama.cpp's `convert_hf_to_gguf.py` (architectures, permutations, metadata) and `gguf.quants` (formats).
"""

from __future__ import annotations

from typing import Final, Literal

GgufFormat = Literal["gguf", "gguf_lora"]
GgufQuantization = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "q4_k_m"]

# First entry of config.json's `architectures` -> what llama.cpp calls it.
ARCHITECTURES: Final[dict[str, str]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
}
# A LoRA's matrices are narrow: blocks of 32 numbers do not fit into a row of its rank.
LORA_QUANTIZATIONS: Final[frozenset[GgufQuantization]] = frozenset({"f32", "f16", "bf16"})
DEFAULT_QUANTIZATION: Final[dict[GgufFormat, GgufQuantization]] = {"gguf": "q8_0", "gguf_lora": "f16"}
BITS: Final[dict[GgufQuantization, float]] = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q5_0": 5.5,
    "q4_0": 4.5,
    "q4_k_m": 5.0,  # most in 4.5, a part in 6.6; narrow rows in 5.5 and 8.5
}
