"""What a program of the trainer tells of a base model without its weights: `OUT/description.json`."""

from __future__ import annotations

from pydantic import Field

from shared.contract.base_facts import LayerKind
from shared.contract.events import TemplateAbilities
from shared.contract.part import Part


class DescriptionSpec(Part):
    """The file that the program is started with."""

    folder: str = Field(description="Holds config.json and, where the model has one, its tokenizer.")


class ExpertKind(Part):
    """Stacks of experts of one name and shape."""

    name: str
    shape: list[int]
    count: int


class ModelBuild(Part):
    """The model as transformers builds it from its config, without memory for weights (torch's `meta` device)."""

    model_class: str
    parameters: int = Field(description="Tied weights count once.")
    tied: list[list[str]] = Field(description="Names of weights that are one.")
    layer_types: dict[str, int] = Field(description="How many layers of each type.")
    linear: list[LayerKind]
    experts: list[ExpertKind]
    beside: list[str] = Field(description="Parts beside the language model, such as a tower for images; never adapted.")


class ModelDescription(Part):
    template: TemplateAbilities | None = Field(default=None, description="null: it has none that can be asked.")
    template_sha256: str | None = None
    build: ModelBuild | None = None
    notes: list[str] = Field(default=[], description="What could not be told, and what its files disagree on.")
