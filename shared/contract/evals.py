"""OpenAI's evals as they stand in requests: what is graded, by which criteria, and where the items come from. Pure.

Source of fields and values: the types of the `openai` package 3.54.0. Criteria that run code or ask another model, logs
and stored completions, and the data source `responses` are not offered: the unions name what is.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, field_validator

from shared.contract.evaluation import MAX_ITEMS, EvaluationOrder, GraderMeasure
from shared.contract.graders import Multi, Placeholders, StringCheck, TextSimilarity
from shared.contract.job_request import MetadataKey, MetadataValue
from shared.contract.part import Part

MAX_CRITERIA: Final = 32
MAX_INLINE: Final = 10_000  # items of one body, which is bounded by itself
NO_MODEL: Final = "-"  # the subject of a run whose answers are given
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
EvalName = Annotated[str, StringConstraints(max_length=200)]

# --- what an eval is --------------------------------------------------------------------------------------------------


class CustomConfig(Part):
    """The shape of items, as a JSON Schema."""

    type: Literal["custom"]
    item_schema: dict[str, Any]
    include_sample_schema: bool = Field(default=False, description="Whether answers are part of the data.")


class StringCriterion(StringCheck):
    """Passed with 1."""

    @property
    def least(self) -> float:
        return 1.0

    def grader(self) -> StringCheck:
        return StringCheck(**dict(self))


class SimilarityCriterion(TextSimilarity):
    """Passed with `pass_threshold` or more."""

    pass_threshold: float = Field(ge=0.0, le=1.0)

    @property
    def least(self) -> float:
        return self.pass_threshold

    def grader(self) -> TextSimilarity:
        return TextSimilarity(**self.model_dump(exclude={"pass_threshold"}))


class MultiCriterion(Multi):
    """Passed with `pass_threshold` or more."""

    pass_threshold: float = 1.0

    @property
    def least(self) -> float:
        return self.pass_threshold

    def grader(self) -> Multi:
        return Multi(**self.model_dump(exclude={"pass_threshold"}))


Criterion = Annotated[StringCriterion | SimilarityCriterion | MultiCriterion, Field(discriminator="type")]
Criteria = Annotated[list[Criterion], Field(min_length=1, max_length=MAX_CRITERIA)]


class CreateEval(Part):
    """Body of `POST /v1/evals`."""

    data_source_config: CustomConfig
    testing_criteria: Criteria
    name: EvalName | None = None
    metadata: Metadata | None = None


class UpdateEval(Part):
    """Body of `POST /v1/evals/{eval_id}`: what is left out stays."""

    name: EvalName | None = None
    metadata: Metadata | None = None


# --- what a run is ----------------------------------------------------------------------------------------------------


class GivenItem(Part):
    """An item, and for a run of type jsonl the answer to be graded: `sample.output_text`."""

    item: dict[str, Any]
    sample: dict[str, Any] | None = None


class FileContent(Part):
    type: Literal["file_content"]
    content: Annotated[list[GivenItem], Field(min_length=1, max_length=MAX_INLINE)]


class FileById(Part):
    """A file of lines `{"item": {…}, "sample": {…}}`."""

    type: Literal["file_id"]
    id: Annotated[str, StringConstraints(min_length=1, max_length=100)]


Source = Annotated[FileContent | FileById, Field(discriminator="type")]


class TemplateMessage(Part):
    """A message with placeholders `{{ item.… }}`. Content is text, or parts of type input_text or output_text."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Placeholders
    type: Literal["message"] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        parts = given if isinstance(given, list) else [given]
        if not all(isinstance(part, dict) and part.get("type") in _TEXTS for part in parts):
            return given
        texts = [part.get("text") for part in parts]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else given


_TEXTS: Final = ("input_text", "output_text")


class MessagesTemplate(Part):
    type: Literal["template"]
    template: Annotated[list[TemplateMessage], Field(min_length=1, max_length=100)]


class MessagesReference(Part):
    """Where in an item its own messages are: `item.input_trajectory`."""

    type: Literal["item_reference"]
    item_reference: Annotated[str, StringConstraints(pattern=r"^item\.[^\s{}]{1,200}$")]


InputMessages = Annotated[MessagesTemplate | MessagesReference, Field(discriminator="type")]


class SamplingParams(Part):
    """How answers are made. The defaults are OpenAI's, except for the length."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_completion_tokens: int = Field(default=256, ge=1, le=32_768)
    seed: int = Field(default=42, ge=0, le=2**31 - 1)


class JsonlDataSource(Part):
    """Items with their answers: nothing is generated."""

    type: Literal["jsonl"]
    source: Source


class CompletionsDataSource(Part):
    """Items that a model answers."""

    type: Literal["completions"]
    source: Source
    model: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    input_messages: InputMessages
    sampling_params: SamplingParams = SamplingParams()


DataSource = Annotated[JsonlDataSource | CompletionsDataSource, Field(discriminator="type")]


class CreateEvalRun(Part):
    """Body of `POST /v1/evals/{eval_id}/runs`."""

    data_source: DataSource
    name: EvalName | None = None
    metadata: Metadata | None = None


# --- a run as an evaluation -------------------------------------------------------------------------------------------


class RunOrder(EvaluationOrder):
    """A run as the chore of evaluations works on it: one subject, and a measure for each criterion."""

    data_source: DataSource
    item_schema: dict[str, Any]
    reads_sample: bool = Field(description="Whether a criterion reads the answer, so that an item without fails.")

    @property
    def max_items(self) -> int:
        return MAX_ITEMS


def measure_name(place: int) -> str:
    """What the scores of a criterion are kept under."""
    return f"criterion_{place}"


def measures(criteria: list[Criterion]) -> list[GraderMeasure]:
    """Each criterion's grader as a measure."""
    return [
        GraderMeasure(type="grader", name=measure_name(place), grader=criterion.grader())
        for place, criterion in enumerate(criteria)
    ]
