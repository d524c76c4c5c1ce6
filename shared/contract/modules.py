"""Names of a model's modules that hold for every family; what a family has of its own: families.py."""

from __future__ import annotations

# Modules that turn hidden states into logits, in any family: adapters there are never trained (TRL projects with the
# head's own weight).
HEADS = frozenset({"lm_head", "embed_out", "output_layer"})


def last(name: str) -> str:
    """The module's own name: `q_proj` of `model.layers.0.self_attn.q_proj`."""
    return name.rsplit(".", 1)[-1]
