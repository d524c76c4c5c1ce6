"""How many bytes a host holds while adapters are merged or combined. Pure; bench/product_memory.py measures it."""

from __future__ import annotations

import math
from typing import Final

from shared.contract.spec import JobSpec
from shared.settle.sizing import (
    FOUR_BIT_DOUBLE,
    OURS,
    Estimate,
    largest_linear,
    quantizable_parameters,
    trained_parameters,
)
from shared.settle.workload import BYTES, workload


def estimate_merge(spec: JobSpec, *, dequantized: bool) -> Estimate:
    """Peak bytes of the host while an adapter is merged into its base.

    Weights are held as they are published, 16-bit as a rule; one linear module at a time is worked on in float32.
    Measured on a 135M model, private and resident: merged 0.68 and 1.09 GB, onto expanded 4-bit weights 0.76 and 1.18.
    """
    facts = spec.base_model.facts
    return Estimate(
        {
            "process": OURS["cpu"].process,
            "weights": BYTES["bfloat16"] * facts.parameters,
            "4-bit weights": math.ceil(FOUR_BIT_DOUBLE * quantizable_parameters(facts)) if dequantized else 0,
            "adapters": 4 * trained_parameters(workload(spec, device="cpu", memory=0)),
            "one weight": 4 * 4 * largest_linear(facts),
        }
    )


def estimate_export(spec: JobSpec, *, whole: bool, dequantized: bool) -> Estimate:
    """Peak bytes of the host while a GGUF file is written: a merge, or the adapter alone, and one tensor in float32.

    Tensors go to the file one at a time: what is read of one, turned into llama.cpp's order, and written.
    """
    facts = spec.base_model.facts
    merge = estimate_merge(spec, dequantized=dequantized)
    terms = dict(merge.terms) if whole else {name: merge.terms[name] for name in ("process", "adapters")}
    largest = facts.vocab_size * facts.hidden_size if whole else 0
    return Estimate({**terms, "one tensor": 3 * 4 * largest})


# What PEFT holds while it combines one module: copies of the whole weight for each adapter, and beside them. The other
# combination types work on the adapters' own narrow matrices.
_COMBINED_AT: Final[dict[str, tuple[float, float]]] = {
    "svd": (3, 1),
    "dare_linear_svd": (3, 1),
    "magnitude_prune_svd": (3, 4.5),
    "dare_ties_svd": (5.25, 3),
    "ties_svd": (5.75, 2.5),
}
_COMBINER: Final = 450_000_000  # bytes of the program with its libraries


def estimate_combination(spec: JobSpec, *, adapters: int, combination_type: str) -> Estimate:
    """Peak bytes of the host while several `adapters` become one. `bench/product_memory.py` measures what is held."""
    facts = spec.base_model.facts
    each, beside = _COMBINED_AT.get(combination_type, (0, 0))
    trained = trained_parameters(workload(spec, device="cpu", memory=0))
    return Estimate(
        {
            "process": _COMBINER,
            "weights": BYTES["bfloat16"] * facts.parameters,
            "adapters": 4 * 2 * adapters * trained,  # and the combined one, of all their ranks at most
            "one weight": math.ceil(4 * (each * adapters + beside) * largest_linear(facts)),
        }
    )
