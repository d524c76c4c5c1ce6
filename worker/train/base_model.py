"""Loads the frozen weights of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from shared.contract.families import EXPANDABLE, WHOLE_ONLY, WHOLE_ONLY_REASON
from shared.contract.spec import AttemptSpec, DeviceKind, Dtype, JobSpec, Quantization, Strategy
from shared.errors import Invalid
from worker.train.attention import attention_for
from worker.train.packed_experts import with_experts
from worker.train.spread_loading import by_weight

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
        Invalid: the weights are published in a form that does not train as it is.
    """
    # Both were refused before the job was queued.
    assert spec.device != "cpu" or spec.job.training.dtype != "float16", "CPUs have no loss scaling for float16"
    assert not quantized or spec.job.base_model.facts.architecture not in WHOLE_ONLY, WHOLE_ONLY_REASON
    config = AutoConfig.from_pretrained(weights, trust_remote_code=False, local_files_only=True)
    return load_frozen(
        weights,
        dtype=torch.float32 if trains_in_full else TORCH_DTYPES[spec.job.training.dtype],
        quantization=_quantization(config, spec.job, quantized=quantized),
        device=spec.device,
        place=first_place(spec),
        row_wise="row_attention" not in spec.without,
    )


def load_frozen(
    weights: Path,
    *,
    dtype: torch.dtype,
    quantization: Any,
    device: DeviceKind,
    place: str | int,
    as_saved: bool = False,
    row_wise: bool = True,
) -> Any:
    """The model of a folder of safetensors, loaded to `place`: one way for training and for whoever asks it later.

    Args:
        quantization: upstream's config of how linear layers are stored; None: as they are published.
        as_saved: they are stored as the folder's own config says.
        row_wise: packed rows attend apart where the family allows it.
    """
    config = AutoConfig.from_pretrained(weights, trust_remote_code=False, local_files_only=True)
    # Whatever is named here, None too, stands in for what the folder's own config says.
    stored = {} if as_saved else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(
        weights,
        dtype=dtype,
        **stored,
        device_map={"": place},
        attn_implementation=attention_for(config, device=device, row_wise=row_wise),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    model.config.use_cache = False
    keep_training_layout(model)
    return model


def _quantization(config: Any, job: JobSpec, *, quantized: bool) -> Any:
    """How linear layers are stored; None: as they are published."""
    stored = stored_as(config)
    if stored not in EXPANDABLE:
        if not quantized:
            return None
        config = four_bit(job.quantization, strategy=job.placement.strategy)
        spread = job.placement.strategy == "fsdp"
        return by_weight(config, in_parts=_reads_no_weights(job)) if spread else config
    if quantized or not job.quantization.dequantize:
        raise Invalid(
            f"The base is published in {stored}, which does not train; use method lora and set quantization.dequantize "
            "to true, which expands it to 16 bits.",
            param="quantization.dequantize",
            code="unsupported_combination",
        )
    return expanding(config)


def _reads_no_weights(job: JobSpec) -> bool:
    """Whether nothing looks at the base's weights between their loading and their spreading over the ranks."""
    return job.adapter.init_lora_weights in ("default", "gaussian") and not job.adapter.modules_to_save


def stored_as(config: Any) -> str | None:
    """How the published weights of a base are quantised; None for plain weights."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def expanding(config: Any) -> Any:
    """Upstream's config that expands such weights as they are loaded; None for a base in 16 bits."""
    kinds = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    stored = stored_as(config)
    return None if stored not in kinds else kinds[stored](dequantize=True)


def keeps_layout(job: JobSpec) -> bool:
    """Whether a model made of this base is saved under the names of the base's own files.

    transformers 5.23 gives expanded MXFP4 experts the names of their 4-bit blocks back, under which nothing reads them.
    """
    return job.base_model.facts.quantised_as != "mxfp4"


def first_place(spec: AttemptSpec) -> str | int:
    """Where the weights are loaded to: this rank's device, or the host's memory if they are to be spread from there.

    On their way to the host 4-bit ones are quantised on the device (`spread_loading`).
    """
    if spec.device == "cpu" or spec.job.placement.strategy == "fsdp":
        return "cpu"
    return torch.cuda.current_device()


def four_bit(quantization: Quantization, *, strategy: Strategy = "single") -> BitsAndBytesConfig:
    """The spec's fields under their upstream names; upstream's own defaults (fp4, float32, single) are never used."""
    # FSDP moves shards of one type: four 4-bit weights then travel as one bfloat16 (PEFT's guide to FSDP and QLoRA).
    storage = torch.bfloat16 if strategy == "fsdp" else torch.uint8
    config = BitsAndBytesConfig(
        bnb_4bit_quant_storage=storage,
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=TORCH_DTYPES[quantization.bnb_4bit_compute_dtype],
    )
    return with_experts(config) if quantization.load_experts_in_4bit else config


def keep_training_layout(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes' inference layout.

    On AVX512-BF16 CPUs `Linear4bit` repacks its weights in place at the first forward in eval mode; later training
    steps then run through a kernel without gradients (bitsandbytes 0.50, `nn/modules.py`), silently.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def recompute_activations(model: Any, *, layers: int | None = None) -> None:
    """Gradient checkpointing: less memory, one more forward pass. Adapters need gradients to reach the first block.

    Args:
        layers: so many of the first ones; None: all. What the others keep is gone before the first is recomputed, so
            that memory is held least long. A family whose layers upstream does not mark recomputes all.
    """
    model.enable_input_require_grads()
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    again = {"use_reentrant": False, "context_fn": partial(_as_in_the_forward_pass, adapted)}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=again)
    for layer in _decoder_layers(model)[layers:] if layers is not None else ():
        for part in layer.modules():
            if isinstance(part, GradientCheckpointingLayer):
                part.gradient_checkpointing = False


def _decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The language model's layers that may recompute their activations, in order; of nested ones the outer."""
    layers = list[torch.nn.Module]()
    inner = set[torch.nn.Module]()
    for module in model.get_decoder().modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            layers.append(module)
            inner.update(module.modules())
    return layers


def _as_in_the_forward_pass(
    adapted: Sequence[BaseTunerLayer],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a computation and of its repetition, in which adapters cast what they are given as they did before.

    Whoever told them not to has taken that back by then, and torch refuses activations of another type.
    """
    cast = not adapted or bool(adapted[0].cast_input_dtype_enabled)
    return nullcontext(), nullcontext() if cast else _without_casts(adapted)


@contextmanager
def _without_casts(adapted: Sequence[BaseTunerLayer]) -> Iterator[None]:
    for layer in adapted:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.cast_input_dtype_enabled = True
