"""The model classes that are exported as GGUF, and the number formats. Known before anything is loaded.

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
