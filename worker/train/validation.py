"""A look at the validation rows that leaves the training as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.train.data import Row
from worker.train.limits import out_of_memory_code
from worker.train.objectives.objective import Objective
from worker.train.packing import group
from worker.train.reporting import Reporter

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


@dataclass
class Evaluator:
    """Looks at validation rows; when memory runs out, with half as many at a time for the rest of the attempt.

    The rows of a forward pass in training stay as they are: a validation file may hold longer rows than the training
    file, and that must not slow down the training.
    """

    objective: Objective
    reporter: Reporter
    least_rows: int = 1  # rows that a forward pass cannot do without
    rows_at_once: int = ROWS_AT_ONCE

    def evaluate(self, model: Any, rows: Sequence[Row], *, should_stop: Callable[[], bool]) -> Tally | None:
        """Loss and accuracy over `rows`; None if a stop was asked for meanwhile. Gradients and random state are kept.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: memory runs out even with `least_rows` at a time.
        """
        while True:
            try:
                return self._evaluate(model, rows, should_stop=should_stop)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if out_of_memory_code(error) is None or self.rows_at_once <= self.least_rows:
                    raise
            # Outside the handler: only now are the tensors of the failed pass let go.
            self.rows_at_once = max(self.least_rows, self.rows_at_once // 2)
            self.reporter.say(
                f"Validation ran out of memory; it goes on with {self.rows_at_once} rows at a time.", level="warn"
            )

    def _evaluate(self, model: Any, rows: Sequence[Row], *, should_stop: Callable[[], bool]) -> Tally | None:
        tally = Tally()
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                for places in group([row.tokens for row in rows], size=self.rows_at_once):
                    if should_stop():
                        return None
                    for batch in self.objective.micro_batches([rows[place] for place in places]):
                        loss = self.objective.loss(model, batch)
                        tally.add(loss.total.item(), weight=batch.weight, correct=loss.correct)
            return tally
        finally:
            model.train()
