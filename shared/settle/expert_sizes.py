"""How large a mixture's experts and the adapters on them are. Pure arithmetic on a base model's facts."""

from __future__ import annotations

from typing import Final

from shared.contract.base_facts import ModelFacts

# Feed-forward layers of a decoder layer without experts; a mixture has none of them as linear modules in general.
FEED_FORWARD = frozenset({"gate_proj", "up_proj", "down_proj"})


def expert_parameters(facts: ModelFacts) -> int:
    """Values of all experts' stacks: as the model is built, else three matrices each; no more than the model has."""
    experts = facts.experts
    if experts is None:
        return 0
    computed = experts.layers * experts.count * 3 * facts.hidden_size * experts.width
    return min(computed if experts.stacked is None else experts.stacked, facts.parameters)


# What bitsandbytes 0.50 counts in 32 bits: values of one tensor.
_MOST_IN_A_STACK: Final = 2**31


def may_pack_experts(facts: ModelFacts) -> bool:
    """Whether the model as it is built has stacks of experts, each small enough to be quantised."""
    experts = facts.experts
    if experts is None or not experts.stacked:
        return False
    return experts.count * 2 * experts.width * facts.hidden_size < _MOST_IN_A_STACK


def expert_adapter(facts: ModelFacts, *, r: int) -> int:
    """Values of an adapter of rank `r` on every expert: each has its own for the stack up and for the stack down."""
    experts = facts.experts
    if experts is None:
        return 0
    up, down = facts.hidden_size + 2 * experts.width, experts.width + facts.hidden_size
    return experts.layers * experts.count * r * (up + down)
