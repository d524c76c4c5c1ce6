"""How long a training by transformers' own Trainer spends in optimizer steps. Imports nothing of this project."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Stopwatch(TrainerCallback):
    """Seconds inside optimizer steps: what our trainer calls `train_seconds`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.monotonic() - self._began
