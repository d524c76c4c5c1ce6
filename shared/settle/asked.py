"""A request as its checks read it, and the sentence by which they refuse. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from shared.contract.base_facts import ModelFacts
from shared.contract.job_request import CreateJob
from shared.contract.modules import FAMILIES, Family
from shared.contract.spec import MethodName, ObjectiveName
from shared.errors import Invalid
from shared.settle.wishes import objective_name, wished_method


class WishGetter(Protocol):
    """How a wish is read: as with a dictionary's `get`."""

    def __call__(self, name: str, default: Any = None, /) -> Any: ...


@dataclass(slots=True)
class FlatRequest:
    """A request, flattened once for the checks below: each of them asks for the same few things.

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
