"""Objective name → how its trainer is built. The only place that asks for an objective by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from shared.contract.spec import AttemptSpec, ObjectiveName
from worker.train.objectives import dpo, kto, reference_free, supervised
from worker.train.objectives.objective import Objective


class BuildObjective(Protocol):
    def __call__(self, model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> Objective: ...


OBJECTIVES: dict[ObjectiveName, BuildObjective] = {
    "supervised": supervised.build,
    "dpo": dpo.build,
    "kto": kto.build,
    "orpo": reference_free.build,
    "simpo": reference_free.build,
}
