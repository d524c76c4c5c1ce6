"""From submit to the first optimizer step, in parts, as a client sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from openai.types.fine_tuning import FineTuningJobEvent
from tunepool.watching import Update

# What each part ends with.
PARTS: Final = ("files checked", "device leased", "model loaded", "first step")


class Milestones:
    """Seconds between the moments that matter, by this client's clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen = {"submitted": clock()}
        self.last_step = 0
        self._first_step = 0  # the first that was seen: a look may find several
        self.train_loss: float | None = None

    def note(self, update: Update) -> None:
        """Take in an update; of each moment the first sight counts."""
        for event in update.events:
            moment = self._moment(event)
            if moment is not None:
                self._seen.setdefault(moment, self._clock())
        if update.job.status == "succeeded":
            self._seen.setdefault("published", self._clock())

    @property
    def loaded(self) -> bool:
        return "model loaded" in self._seen

    def to_first_step(self) -> dict[str, float]:
        """Seconds of each part, and their sum under `total`."""
        moments = ["submitted", *(part for part in PARTS if part in self._seen)]
        parts = {later: self._between(earlier, later) for earlier, later in pairwise(moments)}
        return {**parts, "total": self._between("submitted", moments[-1])}

    def training_seconds(self) -> float:
        """From the moment the model was loaded to the last optimizer step."""
        return self._between("model loaded", "last step")

    def step_seconds(self, *, steps: int) -> float | None:
        """Of an optimizer step, by the first `steps` of them; None before."""
        seen = self.last_step - self._first_step
        return self._exact("first step", "last step") / seen if seen >= steps else None

    def publishing_seconds(self) -> float:
        return self._between("last step", "published")

    def _between(self, earlier: str, later: str) -> float:
        return round(self._exact(earlier, later), 2)

    def _exact(self, earlier: str, later: str) -> float:
        return self._seen[later] - self._seen[earlier]

    def _moment(self, event: FineTuningJobEvent) -> str | None:
        data = event.data if isinstance(event.data, dict) else {}
        if "train_loss" in data:
            self.last_step, self.train_loss = data["step"], data["train_loss"]
            self._first_step = self._first_step or self.last_step
            self._seen["last step"] = self._clock()
            return "first step"
        if "trainable_parameters" in data:
            return "model loaded"
        if "attempt" in data:
            return "device leased"
        return "files checked" if event.message.startswith("Files validated") else None
