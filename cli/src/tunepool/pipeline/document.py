"""Reads `pipeline.yaml`: what to train, how to judge it, and which alias moves. Faults have file, line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tunepool.gate import BadGate
from tunepool.gate_file import MAX_BYTES, composed
from tunepool.requests import BadSetting, MethodName

Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# The stage of an alias, the base model, or any name that the server knows.
SubjectOfRun = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class Strict(BaseModel):
    # Built when a file is first read: most commands read none.
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class Items(Strict):
    """What is asked: exactly one of the three."""

    file: Text | None = Field(default=None, description="A path beside pipeline.yaml, or the id of a file.")
    split: float | None = Field(default=None, gt=0.0, le=1.0, description="This share of the training rows, by hash.")
    suite: Literal["general"] | None = None
    max_items: int | None = Field(default=None, ge=1, le=10_000)

    @model_validator(mode="after")
    def _one_of_three(self) -> Items:
        if sum(value is not None for value in (self.file, self.split, self.suite)) != 1:
            raise ValueError("name exactly one of file, split and suite")
        return self


class Judging(Strict):
    items: Items
    measures: list[dict[str, Any]] | None = Field(default=None, description="As in POST /v1/tunepool/evaluations.")
    beside: list[SubjectOfRun] = Field(
        default=["base"], max_length=6, description="Further subjects: base, or any model; the alias is one by itself."
    )
    generation: dict[str, Any] | None = None
    slices: list[Text] = []
    forgetting: bool = False


class Pipeline(Strict):
    version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]
    training: Text = Field(description="A path beside pipeline.yaml, or the id of a file.")
    validation: Text | None = None
    model: Text = Field(description="The base model.")
    suffix: Text | None = None
    seed: int = Field(default=0, ge=0, description="Stated, so that the same content trains the same adapter.")
    method: MethodName = "supervised"
    hyperparameters: dict[str, Any] = {}
    tunepool: dict[str, Any] = Field(
        default={}, description="As in the body of a job; `queue` has group and supersede set."
    )
    preflight: bool = True
    evaluate: Judging | None = None
    gate: Text | None = Field(default=None, description="A path beside pipeline.yaml; needs `evaluate`.")
    promote: Text | None = Field(default=None, description="An alias such as support-bot@prod; needs `gate`.")

    @model_validator(mode="after")
    def _steps_stand_on_each_other(self) -> Pipeline:
        if self.gate is not None and self.evaluate is None:
            raise ValueError("gate needs evaluate, whose figures it judges")
        if self.promote is not None and self.gate is None:
            raise ValueError("promote needs gate")
        return self


Document = TypeVar("Document", bound=Pipeline)


def schema() -> dict[str, Any]:
    """The JSON schema of pipeline.yaml, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Pipeline.model_json_schema()}


def read_pipeline(path: Path) -> Pipeline:
    """Raises BadSetting with file, line and column."""
    return read_document(path, Pipeline)


def read_document(path: Path, model: type[Document]) -> Document:
    """A pipeline, or a file that says more than one. Raises BadSetting with file, line and column."""
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise BadSetting(
            f"{path} {why}. Name a file of YAML; `tunepool init DATA` writes a pipeline for a folder of data."
        )
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        root = composed(data, what="pipeline")
        _refuse_repeated_keys(root)
        return model.model_validate(_plain(root))
    except BadGate as error:
        place = "" if error.line is None else f":{error.line}:{error.column}"
        raise BadSetting(f"{path}{place}: {error.message}") from None
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A name that is unknown is as a rule the one that another lacks.
        fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
        mark = _node_at(root, fault["loc"], key=fault["type"] == "extra_forbidden").start_mark
        name = ".".join(str(part) for part in fault["loc"])
        words = fault["msg"].removeprefix("Value error, ")
        raise BadSetting(f"{path}:{mark.line + 1}:{mark.column + 1}: {name or 'the pipeline'}: {words}.") from None


def _plain(node: yaml.Node) -> Any:
    try:
        loader = yaml.SafeLoader("")
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = node.start_mark
        raise BadGate(f"A value cannot be read: {error}", line=mark.line + 1, column=mark.column + 1) from None


def _refuse_repeated_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(child)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            mark = key.start_mark
            raise BadGate(f"'{key.value}' stands twice.", line=mark.line + 1, column=mark.column + 1)
        seen.add(key.value)
        _refuse_repeated_keys(value)


def _node_at(node: yaml.Node, path: tuple[int | str, ...], *, key: bool) -> yaml.Node:
    """The node that a fault is about, or the innermost one around it. `key`: its name, not its value."""
    for depth, part in enumerate(path, start=1):
        if isinstance(node, yaml.MappingNode):
            inner = next(((name, value) for name, value in node.value if name.value == part), None)
            if inner is None:
                return node
            node = inner[0] if key and depth == len(path) else inner[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
    return node
