"""What is known of a base model before any of its weights is read."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from shared.contract.part import Part

MOST_LAYER_KINDS: Final = 512  # of a model that exists some ten; more are not written into every job's spec


class LayerKind(Part):
    """Linear layers of one name and shape."""

    name: str = Field(description="Last part of its path; adapters name layers so.")
    inputs: int
    outputs: int
    count: int
    adapted: bool = Field(description="By all-linear.")


class ExpertFacts(Part):
    """The experts of a mixture: stacks of matrices that no linear module holds."""

    layers: int = Field(ge=1, description="Decoder layers that have experts.")
    count: int = Field(ge=2, description="Experts of such a layer.")
    width: int = Field(ge=1, description="Inner width of one expert.")
    stacked: int | None = Field(
        default=None, ge=0, description="Values in such stacks, as transformers builds the model. null: not known."
    )


class ModelFacts(Part):
    """What sizing and placement must know of a base model; read from its config.json, never from its name."""

    architecture: str = Field(description="First entry of config.json's `architectures`.")
    parameters: int = Field(ge=1)
    active_parameters: int | None = Field(
        default=None, ge=1, description="Those that one token passes through: fewer with experts. null: not known."
    )
    expert_parameters: int | None = Field(
        default=None, ge=0, description="Of the experts that a router chooses among. null: not known."
    )
    stored_as: str | None = Field(
        default=None, max_length=40, description="Type of most stored weights, or a quantised form such as mxfp4."
    )
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    tie_word_embeddings: bool = False
    carries_state: str | None = Field(
        default=None,
        description="What lets packed rows leak into each other, so that none are packed: a layer kind or family.",
    )
    experts: ExpertFacts | None = Field(default=None, description="Null: no mixture of experts.")
    beside: str | None = Field(default=None, description="Parts beside the language model; they stay frozen.")
    quantised_as: str | None = Field(default=None, description="How the published weights are quantised, if they are.")
    linear: list[LayerKind] | None = Field(
        default=None,
        max_length=MOST_LAYER_KINDS,
        description="Linear layers but the output layer, as transformers builds the model. null: not built.",
    )
