"""A sweep: one job in many settings, tried beside each other. The body of its request, and what is kept of its looks.

Pure: pydantic only, no I/O, no clock.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from shared.contract.job_request import CreateJob, Label, MetadataKey, MetadataValue
from shared.contract.part import Part
from shared.contract.spec import AnswerMeasure
from shared.errors import Invalid

MAX_TRIALS: Final = 256
MAX_PARAMETERS: Final = 16

# What the looks at the validation file measure. A loss is better when it is lower, everything else when it is higher.
LookMeasure = Literal["valid_loss", "valid_mean_token_accuracy"] | AnswerMeasure
LOSS: Final[LookMeasure] = "valid_loss"
SweepStatus = Literal["running", "paused", "succeeded", "failed", "cancelled"]
TrialState = Literal["planned", "started", "succeeded", "failed", "cancelled", "stopped"]

FieldName = Annotated[
    str, StringConstraints(pattern=r"^(seed|hyperparameters\.[a-z0-9_]{1,64}|tunepool(\.[A-Za-z0-9_]{1,64}){2,4})$")
]
# The sweep itself puts its trials into a group; a tracker's name and a place in the queue are no settings to compare.
_NOT_SWEPT: Final = ("tunepool.queue", "tunepool.integrations")


def event_key(measure: LookMeasure) -> str:
    """The name of a measure in the data of a job's validation events."""
    return measure if measure.startswith("valid_") else f"valid_{measure}"


def lower_is_better(measure: LookMeasure) -> bool:
    return measure == LOSS


class Parameter(Part):
    """What a field takes: some values, or a range. Sampled ranges are even over `scale`, both ends included."""

    values: Annotated[list[Any], Field(min_length=1, max_length=MAX_TRIALS)] | None = None
    min: int | float | None = Field(default=None, description="With `max`: a range; of whole numbers if both are.")
    max: int | float | None = None
    scale: Literal["linear", "log"] = "linear"
    points: int | None = Field(default=None, ge=2, le=MAX_TRIALS, description="So many of a range, for a grid.")

    @model_validator(mode="after")
    def _values_or_range(self) -> Parameter:
        if (self.values is None) == (self.min is None and self.max is None):
            raise ValueError("give either values, or min and max")
        if self.values is not None:
            self._check_values(self.values)
        elif self.min is None or self.max is None or not self.min < self.max:
            raise ValueError("a range needs min and max, and min below max")
        elif self.scale == "log" and self.min <= 0:
            raise ValueError("a range on the log scale begins above 0")
        return self

    def _check_values(self, values: list[Any]) -> None:
        if any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError("a value stands twice")
        if self.points is not None or self.scale != "linear":
            raise ValueError("scale and points belong to a range")


class Grid(Part):
    """Every combination of the values; a range needs `points`."""

    type: Literal["grid"] = "grid"


class RandomSearch(Part):
    """So many combinations, each drawn by the sweep's seed and its own number alone (Bergstra & Bengio 2012)."""

    type: Literal["random"] = "random"
    trials: int = Field(ge=1, le=MAX_TRIALS)


class Halving(Part):
    """Successive halving (Jamieson & Talwalkar 2016): of each rung's trials the best 1/factor go on.

    Rungs are at first_step, first_step·factor, first_step·factor² … optimizer steps, as many as it takes to come down
    to one trial. A trial that has come to its rung waits there, paused, and holds no device.
    """

    type: Literal["halving"] = "halving"
    trials: int | None = Field(default=None, ge=2, le=MAX_TRIALS, description="Drawn as random ones; null: the grid.")
    factor: int = Field(default=3, ge=2, le=10)
    first_step: int = Field(ge=1, le=1_000_000, description="Optimizer steps before the first comparison.")


Strategy = Annotated[Grid | RandomSearch | Halving, Field(discriminator="type")]


class CreateSweep(Part):
    """Body of `POST /v1/tunepool/sweeps`: a job, which of its fields vary, and how they are tried."""

    name: Label | None = None
    job: CreateJob = Field(description="As in POST /v1/fine_tuning/jobs; it needs a validation file.")
    parameters: dict[FieldName, Parameter] = Field(
        min_length=1,
        max_length=MAX_PARAMETERS,
        description="Field -> what it takes. Fields: seed, hyperparameters.NAME, tunepool.PART.NAME.",
    )
    strategy: Strategy
    measure: LookMeasure = Field(default=LOSS, description="Of the looks at the validation file.")
    max_parallel: int = Field(default=4, ge=1, le=64, description="Trials that wait or run at once.")
    budget_device_seconds: float | None = Field(
        default=None, gt=0.0, le=1e9, description="Nothing is started once the trials have used so much."
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of the draws, and of jobs that name no seed.")
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)

    @field_validator("parameters", mode="before")
    @classmethod
    def _lists_are_values(cls, given: Any) -> Any:
        """`[8, 16]` is short for `{"values": [8, 16]}`."""
        if not isinstance(given, dict):
            return given
        return {name: {"values": value} if isinstance(value, list) else value for name, value in given.items()}

    @model_validator(mode="after")
    def _parameters_are_apart(self) -> CreateSweep:
        """Raises Invalid."""
        for name in self.parameters:
            if name.startswith(_NOT_SWEPT):
                raise _refused(name, "cannot be swept; set it in the job")
            if any(other.startswith(f"{name}.") for other in self.parameters):
                raise _refused(name, "is around another parameter; name one of them")
        return self


def _refused(name: str, why: str) -> Invalid:
    return Invalid(f"'parameters.{name}' {why}.", param=f"parameters.{name}")
