"""What a request asks for, whichever door it came through: one field, one value. And the request as its checks read it.

Pure: no data, no device, no storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

from shared.contract.base_facts import ModelFacts
from shared.contract.families import FAMILIES, Family
from shared.contract.job_request import CreateJob, Hyperparameters, TunepoolRequest, chosen
from shared.contract.methods import method_for
from shared.contract.spec import (
    DEFAULT_OBJECTIVE,
    OBJECTIVE_PARTS,
    MethodName,
    Objective,
    ObjectiveName,
    numbers,
)
from shared.errors import Invalid

# Key in `hyperparameters` → our field. The first two are OpenAI's, the others those of services with the same wire.
HYPERPARAMETER_FIELDS: Final = {
    "n_epochs": "training.num_train_epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "packing": "training.packing",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
}
PARTS: Final = ("adapter", "quantization", "training", "placement")


def hyperparameter_sources(request: CreateJob) -> Iterator[tuple[str, Hyperparameters]]:
    """(wire path, object) of each place that hyperparameters were given in, weakest first."""
    if request.hyperparameters is not None:
        yield "hyperparameters", request.hyperparameters
    for name, given in ({} if request.method is None else request.method.given()).items():
        yield f"method.{name}.hyperparameters", given


def hyperparameters(request: CreateJob) -> dict[str, tuple[str, Any]]:
    """Key → (wire path, value) of every hyperparameter that was settled."""
    return {
        key: (f"{path}.{key}", value)
        for path, source in hyperparameter_sources(request)
        for key, value in chosen(source).items()
    }


def wishes(request: CreateJob) -> dict[str, Any]:
    """Field (`training.learning_rate`) → value that the user settled; `tunepool` wins over `hyperparameters`."""
    return wishes_beside(hyperparameters(request), request.tunepool)


def wishes_beside(given: Mapping[str, tuple[str, Any]], ours: TunepoolRequest) -> dict[str, Any]:
    """`wishes` of a request whose `hyperparameters` are known already."""
    wished = {HYPERPARAMETER_FIELDS[key]: value for key, (_, value) in given.items() if key in HYPERPARAMETER_FIELDS}
    _, lora = given.get("lora", ("", True))
    if not lora:
        wished["adapter.method"] = "full"
    for part in PARTS:
        for name, value in chosen(getattr(ours, part)).items():
            wished[f"{part}.{name}"] = value
    return wished


def wished_objective(request: CreateJob) -> Objective:
    """Supervised, unless `method` or `tunepool.objective` says otherwise; its numbers may stand in either."""
    objective = request.tunepool.objective or cast("Objective", OBJECTIVE_PARTS[objective_name(request)]())
    given = hyperparameters(request)
    return objective.model_copy(update={name: given[name][1] for name in numbers(type(objective)) if name in given})


def objective_name(request: CreateJob) -> ObjectiveName:
    """The type of `wished_objective`."""
    if request.tunepool.objective is not None:
        return request.tunepool.objective.type
    return DEFAULT_OBJECTIVE if request.method is None else request.method.type


def wished_method(wished: Mapping[str, Any]) -> MethodName:
    if "adapter.method" in wished:
        method: MethodName = wished["adapter.method"]
        return method
    return method_for(load_in_4bit=wished.get("quantization.load_in_4bit"))


def wished_world(wished: Mapping[str, Any]) -> int:
    """Devices asked for; ddp or fsdp without a number means two."""
    several = wished.get("placement.strategy") in ("ddp", "fsdp") and "placement.nodes" not in wished
    gpus: int = wished.get("placement.gpus", 2 if several else 1)
    nodes: int = wished.get("placement.nodes", 1)
    return gpus * nodes


# --- the request as its checks read it -------------------------------------------------------------------------------


class WishGetter(Protocol):
    """How a wish is read: as with a dictionary's `get`."""

    def __call__(self, name: str, default: Any = None, /) -> Any: ...


@dataclass(slots=True)
class FlatRequest:
    """A request, flattened once for the checks of a submit: each of them asks for the same few things.

    `given`: key -> (wire path, value) of every hyperparameter that was settled.
    """

    request: CreateJob
    facts: ModelFacts
    base_name: str
    given: Mapping[str, tuple[str, Any]]
    wished: Mapping[str, Any]
    get: WishGetter = field(init=False)
    method: MethodName = field(init=False)
    objective: ObjectiveName = field(init=False)
    family: Family | None = field(init=False)

    def __post_init__(self) -> None:
        self.get = cast("WishGetter", self.wished.get)
        self.method = wished_method(self.wished)
        self.objective = objective_name(self.request)
        self.family = FAMILIES.get(self.facts.architecture)


def refuse(param: str, value: object, why: str) -> None:
    """Raises Invalid: the field, its value, and why not."""
    raise Invalid(f"'{param}' is {shown(value)}, but {why}.", param=param)


def shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
