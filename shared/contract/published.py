"""The shape of the adapter that a job publishes, if it differs from the shape that it trains. Pure."""

from __future__ import annotations

from typing import Final

from shared.contract.methods import METHODS
from shared.contract.spec import Adapter, JobSpec

# Starts that move part of the base into the adapter; it is published as a difference of twice the rank.
MUTATING: Final = frozenset({"pissa", "olora"})


def largest_rank(adapter: Adapter) -> int:
    """Of all its modules."""
    return max([adapter.r, *adapter.rank_pattern.values()])


def published_shape(spec: JobSpec) -> Adapter:
    """The adapter as its directory describes it: what was trained on top of a parent has both ranks."""
    adapter, parent = spec.adapter, spec.parent
    if not METHODS[adapter.method].adapter:
        return adapter
    if parent is not None and parent.init_from == "merged":
        rank = parent.rank + largest_rank(adapter)
        alone = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return adapter.model_copy(update={**alone, "init_lora_weights": "default"})
    if adapter.init_lora_weights in MUTATING:
        twice = {
            "r": 2 * adapter.r,
            "lora_alpha": 2 * adapter.lora_alpha,
            "rank_pattern": {name: 2 * rank for name, rank in adapter.rank_pattern.items()},
            "alpha_pattern": {name: 2 * alpha for name, alpha in adapter.alpha_pattern.items()},
        }
        return adapter.model_copy(update={**twice, "init_lora_weights": "default"})
    return adapter
