"""Supervised losses from TRL's fused head on a CPU: the code that a CUDA device runs."""

from __future__ import annotations

from typing import Any

from worker.train.objectives.supervised import LabelledTokenTrainer


def take_the_fused_road(patch: Any = setattr) -> None:
    """Every loss of this process comes from the fused head; `patch` may be `monkeypatch.setattr`."""
    patch(LabelledTokenTrainer, "compute_loss", _fused)


def _fused(trainer: LabelledTokenTrainer, model: Any, inputs: dict[str, Any]) -> Any:
    return trainer._fused_loss(model, inputs, return_outputs=False, items=None)
