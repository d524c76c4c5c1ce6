"""What a user asks for: the bodies of a job's and a preflight's request, built from the parts of the spec.

Pure: pydantic only, no I/O, no clock.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints, create_model

from shared.contract.part import Part
from shared.contract.spec import (
    AUTO,
    OBJECTIVE_PARTS,
    Adapter,
    Auto,
    InitFrom,
    ObjectiveName,
    Placement,
    Preference,
    Preset,
    Quantization,
    Queue,
    Training,
    numbers,
)
from shared.errors import Invalid


def open_fields(part: type[Part]) -> type[Part]:
    """The request form of a part: the same fields and bounds, each also accepting "auto" (its default)."""
    fields: dict[str, Any] = {
        name: (
            Annotated[field.annotation, Field(), *field.metadata] | Auto,
            Field(default=AUTO, description=field.description),
        )
        for name, field in part.model_fields.items()
    }
    return create_model(f"Open{part.__name__}", __base__=Part, __doc__=part.__doc__, **fields)


if TYPE_CHECKING:  # at run time these are built from the parts, so that no field is written twice
    OpenAdapter = Adapter
    OpenQuantization = Quantization
    OpenTraining = Training
    OpenPlacement = Placement
else:

    class OpenAdapter(open_fields(Adapter)):
        __doc__ = Adapter.__doc__

        init_from: InitFrom | Auto = Field(
            default=AUTO,
            description="Where `model` is a tuned one: continue trains its adapter on, merged trains a new adapter on "
            "top of it. The product fits the base model either way.",
        )

    OpenQuantization = open_fields(Quantization)
    OpenTraining = open_fields(Training)
    OpenPlacement = open_fields(Placement)


def chosen(part: Part | None) -> dict[str, Any]:
    """The fields that the user settled: those given and not "auto"."""
    if part is None:
        return {}
    return {name: getattr(part, name) for name in part.model_fields_set if getattr(part, name) != AUTO}


Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
# What Weights & Biases takes as the name of a project or an entity: both become parts of URLs.
WandbName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
WandbTag = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Wandb(Part):
    """A run of Weights & Biases, by the project's secret WANDB_API_KEY."""

    project: WandbName
    name: Label | None = Field(default=None, description="Of the run; the job's id if left out.")
    entity: WandbName | None = Field(default=None, description="Team or user; the default of the API key if left out.")
    tags: Annotated[list[WandbTag], Field(max_length=32)] | None = None


class Integration(Part):
    type: Literal["wandb"]
    wandb: Wandb


class Mlflow(Part):
    """A run of the MLflow server that the project's secret MLFLOW_TRACKING_URI names."""

    experiment: Label = Field(description="By name; made if it is not there.")
    name: Label | None = Field(default=None, description="Of the run; the job's id if left out.")
    tags: Annotated[dict[Label, Label], Field(max_length=16)] | None = None


class MlflowIntegration(Part):
    type: Literal["mlflow"]
    mlflow: Mlflow


class TensorboardIntegration(Part):
    """An event file for TensorBoard, written when the job has ended."""

    type: Literal["tensorboard"]


OwnIntegration = Annotated[MlflowIntegration | TensorboardIntegration, Field(discriminator="type")]


class TunepoolRequest(Part):
    """Everything of ours in a request, under the one key `tunepool`."""

    preset: Preset | None = None
    objective: Preference | None = Field(
        default=None, description="An objective with all its options; `method` takes its numbers only."
    )
    adapter: OpenAdapter | None = None
    quantization: OpenQuantization | None = None
    training: OpenTraining | None = None
    placement: OpenPlacement | None = None
    queue: Queue | None = None
    integrations: Annotated[list[OwnIntegration], Field(max_length=5)] | None = Field(
        default=None, description="Trackers that OpenAI's `integrations` has no word for."
    )


class Hyperparameters(Part):
    """OpenAI's three, and the keys that other services' clients put beside them."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = AUTO
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = AUTO
    learning_rate_multiplier: Annotated[float, Field(gt=0.0, le=1000.0)] | Auto = AUTO
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | Auto = AUTO
    lora: bool | Auto = AUTO
    lora_r: Annotated[int, Field(ge=1, le=1024)] | Auto = AUTO
    lora_alpha: Annotated[int, Field(ge=1, le=65536)] | Auto = AUTO
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | Auto = AUTO
    packing: bool | Auto = AUTO
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | Auto = AUTO
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] | Auto = AUTO
    max_grad_norm: Annotated[float, Field(gt=0.0, le=1000.0)] | Auto = AUTO


def _method_of(objective: type[Part]) -> type[Part]:
    """What stands under `method.NAME`: the hyperparameters of all objectives, and the numbers of this one."""
    own: dict[str, Any] = {
        name: (Annotated[float, *objective.model_fields[name].metadata] | Auto, AUTO) for name in numbers(objective)
    }
    named = f"{objective.__name__}Hyperparameters"
    part = create_model(named, __base__=Hyperparameters, **own) if own else Hyperparameters
    options: dict[str, Any] = {"hyperparameters": (part, part())}
    return create_model(f"{objective.__name__}Method", __base__=Part, **options)


class NamedObjective(Part):
    """OpenAI's `method`. `reinforcement` is refused by name."""

    type: ObjectiveName

    def given(self) -> dict[ObjectiveName, Hyperparameters]:
        """Objective → the hyperparameters that stand under its name."""
        parts = {name: getattr(self, name) for name in OBJECTIVE_PARTS}
        return {name: part.hyperparameters for name, part in parts.items() if part is not None}


if TYPE_CHECKING:
    RequestedMethod = NamedObjective
else:  # a part for each objective, so that a new one is asked for as the others are
    _PARTS = {name: (_method_of(part) | None, None) for name, part in OBJECTIVE_PARTS.items()}
    RequestedMethod = create_model("Method", __base__=NamedObjective, __doc__=NamedObjective.__doc__, **_PARTS)


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


_KEPT: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_.-]+")


def slug(text: str) -> str:
    """`text` as it stands in a model's name: letters without their accents, a hyphen for everything else.

    OpenAI takes any text of 1 to 64 characters and writes it as it can stand in a name; so does this.
    A text that needs no change stays as it is. Raises Invalid, `param` suffix, where nothing is left.
    """
    if _KEPT.fullmatch(text):
        return text
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    bare = "".join(letter for letter in plain if not unicodedata.combining(letter))
    name = _OTHER.sub("-", bare).strip("-.")[:64].rstrip("-.")
    if not name:
        raise Invalid(
            "Invalid value for 'suffix': it needs at least one of the characters A-Z, a-z, 0-9 or _.", param="suffix"
        )
    return name


Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(slug)]


class CreateJob(Part):
    """Body of `POST /v1/fine_tuning/jobs`: OpenAI's fields, and ours under `tunepool`."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    suffix: Suffix | None = Field(
        default=None, description="Part of the tuned model's name; other characters than A-Za-z0-9_.- become a hyphen."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    method: RequestedMethod | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Deprecated by OpenAI; same as method.supervised's."
    )
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    tunepool: TunepoolRequest = TunepoolRequest()


DEFAULT_PREVIEW_ROWS: Final = (1, 2, 3)
RowNumber = Annotated[int, Field(ge=1, le=100_000_000)]


class CreatePreflight(CreateJob):
    """Body of `POST /v1/tunepool/preflights`: a job's body, and the rows whose tokens are to be shown."""

    preview_rows: Annotated[list[RowNumber], Field(max_length=20)] | None = Field(
        default=None, description="Rows of the training file, counted from 1; the first three if left out."
    )

    def job(self) -> CreateJob:
        """The job that this preflight is about."""
        return CreateJob.model_validate(self.model_dump(exclude={"preview_rows"}, exclude_unset=True))
