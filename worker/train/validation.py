"""A look at the validation rows that leaves the training as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.train.data import Row
from worker.train.objectives.objective import Objective
from worker.train.packing import group

ROWS_AT_ONCE = 16  # how many rows are laid out together: bounds the batch kept in memory, not the forward pass


@dataclass
class Tally:
    """Sums over forward passes, and the means that follow."""

    total: float = 0.0
    weight: int = 0
    correct: int | None = 0

    @property
    def loss(self) -> float:
        return self.total / max(self.weight, 1)

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct / max(self.weight, 1)

    def add(self, total: float, *, weight: int, correct: int | None) -> None:
        self.total += total
        self.weight += weight
        self.correct = None if correct is None or self.correct is None else self.correct + correct

    def plus(self, other: Tally) -> Tally:
        both = Tally(total=self.total, weight=self.weight, correct=self.correct)
        both.add(other.total, weight=other.weight, correct=other.correct)
        return both


def evaluate(model: Any, rows: Sequence[Row], *, objective: Objective, should_stop: Callable[[], bool]) -> Tally | None:
    """Loss and accuracy over `rows`; None if a stop was asked for meanwhile. Gradients and random state are kept."""
    tally = Tally()
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        for places in group([row.tokens for row in rows], size=ROWS_AT_ONCE):
            if should_stop():
                break
            for batch in objective.micro_batches([rows[place] for place in places]):
                loss = objective.loss(model, batch)
                tally.add(loss.total.item(), weight=batch.weight, correct=loss.correct)
        else:
            model.train()
            return tally
    model.train()
    return None
