"""Act two: the frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from shared.contract.families import WHOLE_ONLY, WHOLE_ONLY_REASON
from shared.contract.spec import AttemptSpec, Dtype, Quantization, Strategy
from shared.errors import Invalid
from worker.train.attention import attention_for

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_model(spec: AttemptSpec, *, weights: Path, quantized: bool, trains_in_full: bool) -> Any:
    """The base model from safetensors in `weights`, on the attempt's device, ready to be adapted.

    Args:
        weights: the base model's directory, or that of a checkpoint when every weight trains.
        quantized: store the linear layers in 4 bits (NF4 or FP4, arXiv 2305.14314).
        trains_in_full: every weight trains, so they stay in float32 whatever the arithmetic is.

    Raises:
        Invalid: float16 asked for on a CPU, which has no loss scaling for it; 4 bits for a family that cannot.
    """
    if spec.device == "cpu" and spec.job.training.dtype == "float16":
        raise Invalid("float16 does not train on a CPU; use bfloat16 or float32.", param="training.dtype")
    if quantized and spec.job.base_model.facts.architecture in WHOLE_ONLY:
        raise Invalid(f"{WHOLE_ONLY_REASON}; use method lora.", param="adapter.method", code="unsupported_combination")
    dtype = torch.float32 if trains_in_full else TORCH_DTYPES[spec.job.training.dtype]
    config = AutoConfig.from_pretrained(weights, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        weights,
        dtype=dtype,
        quantization_config=four_bit(spec.job.quantization, strategy=spec.job.placement.strategy)
        if quantized
        else None,
        device_map={"": first_place(spec)},
        attn_implementation=attention_for(config, device=spec.device),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    model.config.use_cache = False
    keep_training_layout(model)
    return model


def first_place(spec: AttemptSpec) -> str | int:
    """Where the weights are loaded to: this rank's device, or the host's memory if they are to be spread from there."""
    if spec.device == "cpu" or spec.job.placement.strategy == "fsdp":
        return "cpu"
    return torch.cuda.current_device()


def four_bit(quantization: Quantization, *, strategy: Strategy = "single") -> BitsAndBytesConfig:
    """The spec's fields under their upstream names; upstream's own defaults (fp4, float32, single) are never used."""
    # FSDP moves shards of one type: four 4-bit weights then travel as one bfloat16 (PEFT's guide to FSDP and QLoRA).
    storage = torch.bfloat16 if strategy == "fsdp" else torch.uint8
    return BitsAndBytesConfig(
        bnb_4bit_quant_storage=storage,
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=TORCH_DTYPES[quantization.bnb_4bit_compute_dtype],
    )


def keep_training_layout(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes' inference layout.

    On AVX512-BF16 CPUs `Linear4bit` repacks its weights in place at the first forward in eval mode; later training
    steps then run through a kernel without gradients (bitsandbytes 0.50, `nn/modules.py`), silently.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing: less memory, one more forward pass. Adapters need gradients to reach the first block."""
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
