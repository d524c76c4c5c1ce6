"""A LoRA adapter as a GGUF file that llama.cpp lays over its base (`--lora`), and Ollama (`ADAPTER`).

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`: per weight two tensors, `NAME.lora_a`
`[rank, in]` and `NAME.lora_b` `[out, rank]`, and one alpha for all. It adds `alpha / rank * B @ A`, rank read off B.
PEFT's scale may be another one for each module (`use_rslora`, `alpha_pattern`); what is left of it goes into B.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from transformers import AutoConfig

from shared.contract.merge_request import CreateExport, MergeSpec
from shared.errors import Invalid
from worker.train.gguf_figures import llama_cpp_name
from worker.train.gguf_tensors import FILE_TYPES, GgufTensor, Names, in_numpy, write_tensors

_PLACE: Final = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B)\.weight$")


def write_adapter(spec: MergeSpec, request: CreateExport, file: Path) -> None:
    """Write the adapter of `spec`. Raises Invalid: `adapter_not_exported`, `architecture_not_exported`."""
    config = AutoConfig.from_pretrained(spec.base_model_path, trust_remote_code=False, local_files_only=True)
    architecture = llama_cpp_name(config)
    adapter = PeftConfig.from_pretrained(spec.adapter_paths[0])
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.lora_alpha))
    writer.add_name(request.adapter)
    writer.add_file_type(FILE_TYPES[request.settled])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tensors(writer, _pieces(spec, adapter, config, Names(config, architecture)), request.settled)


def _pieces(spec: MergeSpec, adapter: Any, config: Any, names: Names) -> list[GgufTensor]:
    weights = load_peft_weights(spec.adapter_paths[0], device="cpu")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        match = _PLACE.fullmatch(name)
        if match is None:
            raise _refused(f"it has the tensor {name}, and llama.cpp takes the matrices of LoRA alone")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    pieces = []
    for module, pair in pairs.items():
        if module == "lm_head" and config.tie_word_embeddings:
            raise _refused("it adapts lm_head, which is no weight of its own in this model")
        weight = f"{module}.weight"
        scaled = names.in_order(weight, pair["B"].float() * _left_over(adapter, module, rank=pair["A"].shape[0]))
        for suffix, matrix in (("lora_a", pair["A"]), ("lora_b", scaled)):
            pieces.append(_piece(f"{names.of(weight)}.{suffix}", matrix))
    return pieces


def _piece(name: str, matrix: torch.Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(matrix.shape), lambda: in_numpy(matrix))


def _left_over(adapter: Any, module: str, *, rank: int) -> float:
    """PEFT's scale of a module by the one that llama.cpp computes; 1 for a plain adapter."""
    patterns = adapter.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), adapter.lora_alpha)
    scale = alpha / rank**0.5 if adapter.use_rslora else alpha / rank
    return float(scale / (adapter.lora_alpha / rank))


def _refused(why: str) -> Invalid:
    return Invalid(
        f"This adapter cannot be a GGUF adapter: {why}. Export the merged model instead: format gguf.",
        code="adapter_not_exported",
        param="adapter",
    )
