"""Refusals that the base itself decides: how its weights are published, its class, its experts. Pure."""

from __future__ import annotations

from shared.contract.families import (
    CAUSAL_WRAPPERS,
    EXPANDABLE,
    HALVED,
    WHOLE_ONLY,
    WHOLE_ONLY_REASON,
    leaves_float16,
)
from shared.contract.methods import METHODS, with_other_weights
from shared.settle.expert_sizes import may_pack_experts
from shared.settle.sizing import GIB
from shared.settle.wishes import FlatRequest, refuse


def check_stored_weights(asked: FlatRequest) -> None:
    """A base that is published quantised trains from its expanded weights, or not at all."""
    stored, base = asked.facts.quantised_as, asked.base_name
    expand, param = asked.get("quantization.dequantize", False), "tunepool.quantization.dequantize"
    if stored is None or stored == "bitsandbytes":
        if expand:
            refuse(param, expand, f"{base} is not published in {' or '.join(EXPANDABLE)}; drop it")
        return
    if stored not in EXPANDABLE:
        refuse("model", base, f"its weights are published as {stored}, which does not train; use its 16-bit original")
    if METHODS[asked.method].quantized:
        why = f"{base} is published in {stored} and is not quantised again as it is loaded"
        remedy = f"use method {with_other_weights(asked.method)} with tunepool.quantization.dequantize true"
        refuse("tunepool.adapter.method", asked.method, f"{why}; {remedy}")
    if not expand:
        needs = f"{2 * asked.facts.parameters / GIB:.1f} GiB of weights"
        why = f"{base} is published in {stored}, which does not train"
        refuse(param, expand, f"{why}; set it to true, which expands them to 16 bits ({needs}), or use a 16-bit base")


def check_class(asked: FlatRequest) -> None:
    """A base whose class cannot be trained on text, or not with anything beside it."""
    architecture = asked.facts.architecture
    if architecture.endswith("ForConditionalGeneration") and architecture not in CAUSAL_WRAPPERS:
        why = f"{architecture} has no class in transformers that is trained on text alone; use a base that is text only"
        refuse("model", asked.base_name, why)
    if architecture in HALVED:
        why = f"{architecture} halves weights in place when it is asked, and an adapter beside them is not halved"
        refuse("model", asked.base_name, f"{why}; use another base")


def check_float16(asked: FlatRequest) -> None:
    if asked.get("training.dtype") == "float16" and leaves_float16(asked.facts.architecture):
        why = f"activations of {asked.facts.architecture} leave float16's range, and the loss would be no number"
        refuse("tunepool.training.dtype", "float16", f"{why}; use bfloat16, or float32 on GPUs that lack it")


def check_experts(asked: FlatRequest) -> None:
    targets = asked.get("adapter.target_modules")
    if targets == "experts" and asked.facts.experts is None:
        why = f"{asked.base_name} has no experts that its config.json names; use all-linear"
        refuse("tunepool.adapter.target_modules", targets, why)


def check_packed_experts(asked: FlatRequest) -> None:
    packed, param = asked.get("quantization.load_experts_in_4bit", False), "tunepool.quantization.load_experts_in_4bit"
    if packed and not may_pack_experts(asked.facts):
        why = f"{asked.base_name} has no stacks of experts that were seen when it was looked up, or too large ones"
        refuse(param, packed, f"{why}; drop it")


def check_four_bits(asked: FlatRequest) -> None:
    if METHODS[asked.method].quantized and asked.facts.architecture in WHOLE_ONLY:
        remedy = f"use method {with_other_weights(asked.method)}"
        refuse("tunepool.adapter.method", asked.method, f"{WHOLE_ONLY_REASON}; {remedy}")
