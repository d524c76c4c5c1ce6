"""Supervised losses from TRL's fused head on a CPU: the code that a CUDA device runs."""

from __future__ import annotations

from typing import Any

from worker.train.objectives import supervised


def take_the_fused_road(patch: Any = setattr) -> None:
    """Every loss of this process comes from the fused head; `patch` may be `monkeypatch.setattr`."""
    patch(supervised, "kernels_serve", lambda _spec: False)
    patch(supervised, "_labelled_loss", supervised.fused_loss)
