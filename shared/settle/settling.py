"""A job that is being settled: what was asked, what is known, and what was chosen so far with its reasons. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shared.contract.base_facts import ModelFacts
from shared.contract.objectives import OBJECTIVES, ObjectiveFacts
from shared.contract.spec import DataFacts, DeviceKind, MethodName, Objective, Preset
from shared.settle.calibration import Measurement

RESERVE: Final = 0.02  # of the device


@dataclass(frozen=True)
class DeviceFacts:
    """The device (or each of them) that the job will run on. Sizes are bytes; `free_bytes` when no job is there."""

    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    bfloat16: bool
    capability: tuple[int, int] | None = None

    @property
    def budget(self) -> int:
        """The most bytes that a job may ask of the device. The plan looks for as many, and adds nothing.

        A reserve stays for what changes between the settling and the start, such as a desktop.
        """
        return max(0, min(self.free_bytes, self.total_bytes) - int(self.total_bytes * RESERVE))


@dataclass(frozen=True)
class Scenario:
    """One row of the practice's table: rank, learning rate, epochs (fewest, most)."""

    r: tuple[int, int]
    learning_rate: float
    epochs: tuple[int, int]


PRESETS: Final[dict[Preset, Scenario]] = {
    "prototype": Scenario(r=(8, 8), learning_rate=3e-4, epochs=(1, 2)),
    "general": Scenario(r=(16, 16), learning_rate=2e-4, epochs=(3, 3)),
    "complex": Scenario(r=(32, 64), learning_rate=1e-4, epochs=(3, 5)),
    "large_dataset": Scenario(r=(16, 16), learning_rate=5e-5, epochs=(1, 2)),
}


@dataclass
class Settling:
    """The values settled so far, and the reasons of those that we chose."""

    wished: Mapping[str, Any]
    facts: ModelFacts
    data: DataFacts
    device: DeviceFacts
    objective: Objective
    preset: Preset | None
    multiplier: float
    measurements: Sequence[Measurement]
    inherited: Mapping[str, Any] = field(default_factory=dict)
    heir_of: str = ""  # the tuned model that it is inherited from
    settled: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def settle(self, name: str, automatic: Callable[[Settling], tuple[Any, str]]) -> None:
        if name in self.wished:
            self.settled[name] = self.wished[name]
        elif name in self.inherited:
            self.settled[name], self.reasons[name] = self.inherited[name], f"as {self.heir_of}"
        else:
            self.settled[name], self.reasons[name] = automatic(self)

    def change(self, name: str, value: Any, reason: str) -> None:
        """Replace a value that was ours to choose."""
        assert name in self.reasons
        self.settled[name], self.reasons[name] = value, reason

    def part(self, part: str) -> dict[str, Any]:
        return {name.split(".")[1]: value for name, value in self.settled.items() if name.startswith(f"{part}.")}

    @property
    def method(self) -> MethodName:
        method: MethodName = self.settled["adapter.method"]
        return method

    @property
    def facts_of_objective(self) -> ObjectiveFacts:
        return OBJECTIVES[self.objective.type]

    @property
    def world(self) -> int:
        gpus: int = self.settled["placement.gpus"]
        nodes: int = self.settled["placement.nodes"]
        return gpus * nodes

    @property
    def scenario(self) -> Scenario | None:
        return None if self.preset is None else PRESETS[self.preset]
