"""Evaluations: the body of a request, and the report that comes of it. Pure.

A gate reads `Report`: a figure stands at `subjects[NAME].measures[MEASURE]`, a paired difference in `differences`.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from shared.contract.graders import Grader
from shared.contract.part import Part
from shared.errors import Invalid

MAX_SUBJECTS: Final = 8
MAX_MEASURES: Final = 32
MAX_ITEMS: Final = 10_000
CONFIDENCE: Final = 0.95

SubjectName = Annotated[str, StringConstraints(min_length=1, max_length=300)]
# What a gate can name.
MeasureName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
FieldPath = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SuiteName = Literal["general"]
Better = Literal["higher", "lower", "neither"]

# --- items ------------------------------------------------------------------------------------------------------------


class ItemsOfFile(Part):
    """Every row of a checked file, or its first `max_items`."""

    type: Literal["file"]
    file_id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    max_items: int = Field(default=1000, ge=1, le=MAX_ITEMS)


class ItemsOfSplit(Part):
    """The rows of a job's training file whose sha256 falls into a share: the same rows whatever their order."""

    type: Literal["split"]
    job: Annotated[str, StringConstraints(min_length=1, max_length=300)] = Field(
        description="A job, by id; its training file is read."
    )
    share: float = Field(default=0.1, gt=0.0, le=1.0)
    max_items: int = Field(default=1000, ge=1, le=MAX_ITEMS)


class ItemsOfSuite(Part):
    """A suite that comes with Tunepool."""

    type: Literal["suite"]
    suite: SuiteName


ItemsWanted = Annotated[ItemsOfFile | ItemsOfSplit | ItemsOfSuite, Field(discriminator="type")]

# --- measures ---------------------------------------------------------------------------------------------------------


class LikelihoodMeasure(Part):
    """How well a subject predicts the reference answer; nothing is generated.

    loss: mean negative logarithm per token; perplexity: its exponential; token_accuracy: share of tokens that were
    the likeliest.
    """

    type: Literal["loss", "perplexity", "token_accuracy"]
    name: MeasureName


class TextMeasure(Part):
    """1 where the answer is the reference (exact_match) or has it in it (contains), white space around both aside."""

    type: Literal["exact_match", "contains"]
    name: MeasureName
    reference: Annotated[str, StringConstraints(max_length=100_000)] | None = Field(
        default=None, description="Same for every item, with placeholders `{{ item.… }}`; null: the row's own answer."
    )
    ignore_case: bool = False


class RegexMeasure(Part):
    """1 where the pattern is in the answer. One search has 0.1 s; after that the item has no value, and says why."""

    type: Literal["regex"]
    name: MeasureName
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    ignore_case: bool = False


class JsonMeasure(Part):
    """1 where the answer is JSON (RFC 8259)."""

    type: Literal["json_valid"]
    name: MeasureName


class SchemaMeasure(Part):
    """1 where the answer is JSON that a schema (draft 2020-12) accepts. `$ref` may point into the schema only."""

    type: Literal["json_schema"]
    name: MeasureName
    json_schema: dict[str, Any]


class NumericMeasure(Part):
    """1 where the last number of the answer is within tolerance of the last number of the reference."""

    type: Literal["numeric"]
    name: MeasureName
    absolute: float = Field(default=0.0, ge=0.0)
    relative: float = Field(default=0.0, ge=0.0, description="Share of the reference's size.")


class FieldsMeasure(Part):
    """Share of the reference's JSON fields (leaves) that the answer has with the same value."""

    type: Literal["json_fields"]
    name: MeasureName
    fields: Annotated[list[FieldPath], Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Paths such as `order.id` or `lines[0].sku`; null: every leaf of the reference."
    )


class GraderMeasure(Part):
    """The reward of one of OpenAI's graders: `item` is the row, `sample` the answer."""

    type: Literal["grader"]
    name: MeasureName
    grader: Grader


class WinRateMeasure(Part):
    """1 where a subject's value of measure `by` is better than that of `against`, 0.5 where equal, 0 where worse."""

    type: Literal["win_rate"]
    name: MeasureName
    by: MeasureName


class EffortMeasure(Part):
    """latency: seconds until the answer was whole; length: its characters; tokens: its tokens."""

    type: Literal["latency", "length", "tokens"]
    name: MeasureName


Measure = Annotated[
    LikelihoodMeasure
    | TextMeasure
    | RegexMeasure
    | JsonMeasure
    | SchemaMeasure
    | NumericMeasure
    | FieldsMeasure
    | GraderMeasure
    | WinRateMeasure
    | EffortMeasure,
    Field(discriminator="type"),
]
# Of a measure's type; a win rate is better when higher, whatever it is by.
BETTER: Final[dict[str, Better]] = {
    "loss": "lower",
    "perplexity": "lower",
    "latency": "lower",
    "length": "neither",
    "tokens": "neither",
}


def better(measure: Measure) -> Better:
    """Which way a measure's values improve."""
    return BETTER.get(measure.type, "higher")


def default_measures() -> list[Measure]:
    """What is measured when a request names nothing: what needs no wish."""
    return [
        LikelihoodMeasure(type="loss", name="loss"),
        LikelihoodMeasure(type="token_accuracy", name="token_accuracy"),
        TextMeasure(type="exact_match", name="exact_match"),
    ]


# --- the request ------------------------------------------------------------------------------------------------------


class GenerationSettings(Part):
    """How answers are made. At temperature 0 every token is the likeliest, and `seed` says nothing."""

    max_tokens: int = Field(default=256, ge=1, le=32_768)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    stop: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(max_length=4)] = Field(
        default_factory=list, description="Texts that end an answer; they are no part of it."
    )
    at_once: int = Field(
        default=32,
        ge=1,
        le=256,
        description="Items answered together, where memory suffices. With 1 an answer depends on its item alone, to "
        "the last bit.",
    )


class EvaluationOrder(Part):
    """What is measured on whom and how, wherever the items come from."""

    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    subjects: Annotated[list[SubjectName], Field(min_length=1, max_length=MAX_SUBJECTS)] = Field(
        description="Base models, aliases, `ft:…`, `…:ckpt-step-N` or ids of combinations; those on one base share it."
    )
    measures: Annotated[list[Measure], Field(min_length=1, max_length=MAX_MEASURES)] = Field(
        default_factory=default_measures
    )
    generation: GenerationSettings = GenerationSettings()
    against: SubjectName | None = Field(
        default=None, description="One of the subjects; every other one is compared with it, item by item."
    )
    slices: Annotated[list[FieldPath], Field(max_length=8)] = Field(
        default_factory=list, description="Keys of the rows, such as `metadata.language`: figures for each value."
    )
    forgetting: bool = Field(default=False, description="Ask the suite `general` too, and report it apart.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of the bootstrap.")
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field(default_factory=dict, max_length=16)

    def timed_generation(self) -> GenerationSettings:
        """As asked; where seconds are measured, items are answered one after the other."""
        timed = any(measure.type == "latency" for measure in self.measures)
        return self.generation.model_copy(update={"at_once": 1}) if timed else self.generation

    @model_validator(mode="after")
    def _names_agree(self) -> EvaluationOrder:
        _once(self.subjects, "subjects")
        _once([measure.name for measure in self.measures], "measures")
        if self.against is not None and self.against not in self.subjects:
            raise Invalid(f"'{self.against}' is none of the subjects; add it, or leave it out.", param="against")
        for number, measure in enumerate(self.measures):
            if isinstance(measure, WinRateMeasure):
                self._check_win_rate(measure, f"measures[{number}].by")
        return self

    def _check_win_rate(self, measure: WinRateMeasure, param: str) -> None:
        if self.against is None:
            raise Invalid("A win rate needs 'against', the subject to win over.", param="against")
        by = next((other for other in self.measures if other.name == measure.by), None)
        if by is None or isinstance(by, WinRateMeasure) or better(by) == "neither":
            raise Invalid(
                f"'{measure.by}' is no measure here that is better higher or lower; name one of the others.",
                param=param,
            )


class CreateEvaluation(EvaluationOrder):
    """Body of `POST /v1/tunepool/evaluations`."""

    items: ItemsWanted


def _once(names: list[str], param: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise Invalid(f"'{twice}' stands twice in '{param}'; give each its own name.", param=param)


# --- the report -------------------------------------------------------------------------------------------------------


class Figure(Part):
    """A mean over `n` items, and the interval that holds it with 95 % by a seeded bootstrap; null without an item.

    One item has no interval: `low` and `high` are null then.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None


class SubjectFigures(Part):
    measures: dict[str, Figure]
    failures: int = Field(default=0, description="Items that this subject gave no answer to.")


class Difference(Part):
    """Subject less `against`, over the items that both have a value for."""

    subject: str
    against: str
    measure: str
    n: int
    mean: float | None
    low: float | None
    high: float | None


class SliceFigures(Part):
    """The figures of the items whose `key` is `value`; `value` is null where a row has no such key."""

    key: str
    value: str | None
    items: int
    subjects: dict[str, SubjectFigures]


class MeasureFacts(Part):
    type: str
    better: Better


class ReportOfItems(Part):
    """What was measured on one set of items."""

    subjects: dict[str, SubjectFigures]
    differences: list[Difference]
    items: int
    failures: int = Field(description="Items with no answer, over all subjects.")


class EvaluationReport(ReportOfItems):
    """`report` of an evaluation that has succeeded."""

    measures: dict[str, MeasureFacts]
    slices: list[SliceFigures]
    forgetting: ReportOfItems | None = Field(default=None, description="The same measures on the suite `general`.")
    confidence: float = CONFIDENCE
    resamples: int
    seed: int
