"""A request as its checks read it, and the sentence by which they refuse. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.contract.base_facts import ModelFacts
from shared.contract.job_request import CreateJob
from shared.contract.modules import FAMILIES, Family
from shared.contract.spec import MethodName
from shared.errors import Invalid
from shared.settle.wishes import wished_method


@dataclass(frozen=True)
class Asked:
    """A request, flattened once for the checks below."""

    request: CreateJob
    facts: ModelFacts
    base_name: str
    wished: Mapping[str, Any]

    @property
    def method(self) -> MethodName:
        return wished_method(self.wished)

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.facts.architecture)

    def get(self, name: str, default: Any = None) -> Any:
        return self.wished.get(name, default)


def refuse(param: str, value: object, why: str) -> None:
    """Raises Invalid: the field, its value, and why not."""
    raise Invalid(f"'{param}' is {shown(value)}, but {why}.", param=param)


def shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
