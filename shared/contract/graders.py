"""OpenAI's graders as they stand in a request: what is compared with what, and how. Pure.

Source of fields and values: the types of the `openai` package 3.54.0 and OpenAI's guide "Graders". Graders that run
code (`python`) or ask another model (`score_model`, `label_model`) are not offered and are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from shared.contract.formula import BadFormula, Formula
from shared.contract.part import Part
from shared.errors import Invalid

MAX_TEXT: Final = 100_000  # characters of a text with placeholders
MAX_GRADERS: Final = 32

# Not offered, and why: `cosine` needs an embedding model, `meteor` needs WordNet.
Metric = Literal["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
Placeholders = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
GraderName = Annotated[str, StringConstraints(min_length=1, max_length=100)]
# What a formula can name.
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]


class StringCheck(Part):
    """1 where the comparison holds, else 0. `like`: the input contains the reference; `ilike`: in any case."""

    type: Literal["string_check"]
    name: GraderName
    input: Placeholders
    reference: Placeholders
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(Part):
    """From 0 (nothing in common) to 1 (equal)."""

    type: Literal["text_similarity"]
    name: GraderName
    input: Placeholders
    reference: Placeholders
    evaluation_metric: Metric


SingleGrader = Annotated[StringCheck | TextSimilarity, Field(discriminator="type")]


class Multi(Part):
    """Several graders, and a formula that makes one score of theirs."""

    type: Literal["multi"]
    name: GraderName
    graders: Annotated[dict[Variable, SingleGrader], Field(min_length=1, max_length=MAX_GRADERS)]
    calculate_output: Annotated[str, StringConstraints(min_length=1, max_length=1000)]

    @field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """A dict from name to grader is the wire; the SDK's type is one grader, and a list is in OpenAI's examples."""
        if isinstance(given, dict) and isinstance(given.get("type"), str):
            given = [given]
        if isinstance(given, list):
            return {item.get("name", ""): item for item in given if isinstance(item, dict)}
        if isinstance(given, dict):
            return {name: _named(item, name) for name, item in given.items()}
        return given

    @model_validator(mode="after")
    def _formula_can_be_read(self) -> Multi:
        self.formula()
        return self

    def formula(self) -> Formula:
        """Raises Invalid, `param` grader.calculate_output."""
        try:
            return Formula(self.calculate_output, names=frozenset(self.graders))
        except BadFormula as error:
            raise Invalid(
                f"Invalid value for 'grader.calculate_output': the formula {error}.", param="grader.calculate_output"
            ) from None


def _named(item: Any, name: Any) -> Any:
    return {"name": name, **item} if isinstance(item, dict) else item


Grader = Annotated[StringCheck | TextSimilarity | Multi, Field(discriminator="type")]


class ValidateGrader(Part):
    """Body of `POST /v1/fine_tuning/alpha/graders/validate`."""

    grader: Grader


class RunGrader(Part):
    """Body of `POST /v1/fine_tuning/alpha/graders/run`."""

    grader: Grader
    model_sample: Annotated[str, StringConstraints(max_length=1_000_000)]
    item: dict[str, Any] = Field(default_factory=dict, description="The row that the placeholders `item.…` read.")


class GradingErrors(Part):
    """What went wrong in one run. OpenAI's fields, all of them always there."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_server_error_details: str | None = None


class GradingMetadata(Part):
    name: str
    type: str
    errors: GradingErrors
    execution_time: float = Field(description="Seconds.")
    scores: dict[str, float]
    token_usage: int | None = None
    sampled_model_name: str | None = None


class Grading(Part):
    """The answer of a run. A grader that fails while it runs gives the reward 0 and says why in `errors`."""

    reward: float
    sub_rewards: dict[str, float]
    model_grader_token_usage_per_model: dict[str, Any]
    metadata: GradingMetadata
