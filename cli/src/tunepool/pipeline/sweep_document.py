"""Reads `sweep.yaml`: a pipeline's file whose training is tried in many settings. Faults have file, line and column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from tunepool.pipeline.document import Pipeline, Strict, read_document

_NUMBER: Final = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
Measure = Literal[
    "valid_loss", "valid_mean_token_accuracy", "exact_match", "contains", "json_valid", "numeric"
]  # fmt: skip


def _read(value: Any) -> Any:
    """YAML 1.1 takes 1e-4, which has no point, for a word."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


class Range(Strict):
    """Values, or a range from min to max; `points` of it for a grid."""

    values: list[Any] | None = None
    min: int | float | None = None
    max: int | float | None = None
    scale: Literal["linear", "log"] | None = None
    points: int | None = Field(default=None, ge=2)

    @field_validator("min", "max", mode="before")
    @classmethod
    def _number(cls, given: Any) -> Any:
        return _read(given)

    @field_validator("values", mode="after")
    @classmethod
    def _numbers(cls, given: list[Any] | None) -> list[Any] | None:
        return None if given is None else [_read(value) for value in given]


class Tries(Strict):
    """How the settings are tried."""

    type: Literal["grid", "random", "halving"]
    trials: int | None = Field(default=None, ge=1, description="Drawn at random; halving without it takes the grid.")
    factor: int | None = Field(default=None, ge=2, description="halving: the best 1/factor go on.")
    first_step: int | None = Field(default=None, ge=1, description="halving: steps before the first comparison.")


class Search(Strict):
    """As in POST /v1/tunepool/sweeps."""

    parameters: dict[str, Range] = Field(
        min_length=1, description="Field -> values or range. Fields: seed, hyperparameters.NAME, tunepool.PART.NAME."
    )
    strategy: Tries
    measure: Measure = "valid_loss"
    max_parallel: int = Field(default=4, ge=1, le=64)
    budget_device_seconds: Annotated[float, Field(gt=0.0)] | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("parameters", mode="before")
    @classmethod
    def _lists_are_values(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: {"values": value} if isinstance(value, list) else value for name, value in given.items()}


class SweepFile(Pipeline):
    """All that pipeline.yaml says, and `sweep`. What follows the training is done with the best trial."""

    sweep: Search

    @model_validator(mode="after")
    def _trials_are_compared(self) -> SweepFile:
        if self.validation is None:
            raise ValueError("a sweep needs validation, on which its trials are compared")
        return self


def schema() -> dict[str, Any]:
    """The JSON schema of sweep.yaml, for editors."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SweepFile.model_json_schema()}
    parameters = made["$defs"]["Search"]["properties"]["parameters"]
    values = {"type": "array", "minItems": 1}
    parameters["additionalProperties"] = {"anyOf": [parameters["additionalProperties"], values]}
    return made


def read_sweep(path: Path) -> SweepFile:
    """Raises BadSetting with file, line and column."""
    return read_document(path, SweepFile)
