"""Warnings of a preflight about a base that is no plain language model in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

from shared.contract.families import HOW_TO_ADAPT_EXPERTS, frozen_experts
from shared.contract.methods import METHODS
from shared.contract.spec import JobSpec
from shared.settle.expert_sizes import expert_adapter, expert_parameters
from shared.settle.sizing import GIB


def cautions(spec: JobSpec) -> list[str]:
    """Sentences for the user, the costliest first."""
    return [*_of_experts(spec), *_of_the_base(spec)]


def _of_experts(spec: JobSpec) -> Iterator[str]:
    facts, adapter, method = spec.base_model.facts, spec.adapter, METHODS[spec.adapter.method]
    values = expert_parameters(facts)
    if not values or not method.adapter:
        return
    if spec.quantization.load_experts_in_4bit:
        yield (
            f"The experts are in 4 bits too, {values / 2 / GIB:.1f} GiB and their scales: each pass expands those of "
            "the layer that it is in, which takes time."
        )
    elif method.quantized:
        yield (
            f"The experts stay in 16 bits, {2 * values / GIB:.1f} GiB: bitsandbytes quantises linear modules only, and "
            "the experts of a mixture are none. quantization.load_experts_in_4bit stores them in 4 bits."
        )
    if adapter.target_modules != "experts":
        yield f"{frozen_experts(values)} {HOW_TO_ADAPT_EXPERTS}"
        return
    trained = expert_adapter(facts, r=adapter.r)
    yield (
        f"Every expert has an adapter of its own: {trained / 1e6:,.0f} million trained values of rank {adapter.r}, and "
        "each pass writes a layer's experts with the adapter added. A smaller r costs less."
    )


def _of_the_base(spec: JobSpec) -> Iterator[str]:
    facts = spec.base_model.facts
    if facts.beside is not None:
        yield f"Only the language model is trained; the parts for {facts.beside} stay as they are."
    if spec.quantization.dequantize:
        yield f"The base is published in {facts.quantised_as} and is expanded to 16 bits; the product stands on those."
