"""A look at the validation rows that leaves the training as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from worker.train.data import Row
from worker.train.evaluation_rows import EvaluationTooLarge
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code
from worker.train.objectives.objective import Loss, MicroBatch, Objective
from worker.train.packing import group
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter

ROWS_AT_ONCE = 16  # how many rows are laid out together: bounds the batch kept in memory, not the forward pass


@dataclass
class Tally:
    """Sums over forward passes, and the means that follow."""

    total: float = 0.0
    weight: int = 0
    tokens: int = 0
    correct: int | None = 0

    @property
    def loss(self) -> float:
        return self.total / max(self.weight, 1)

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct / max(self.weight, 1)

    def plus(self, other: Tally) -> Tally:
        known = self.correct is not None and other.correct is not None
        return Tally(
            total=self.total + other.total,
            weight=self.weight + other.weight,
            tokens=self.tokens + other.tokens,
            correct=(self.correct or 0) + (other.correct or 0) if known else None,
        )

    def over(self, ranks: Ranks) -> Tally:
        """The sums over all ranks."""
        total, weight, tokens, correct = ranks.summed(self.total, self.weight, self.tokens, self.correct or 0)
        unknown = ranks.any(self.correct is None)
        return Tally(total, int(weight), int(tokens), correct=None if unknown else int(correct))


@dataclass
class Sums:
    """The figures of forward passes, added up where they are: nobody waits for the device until they are read."""

    total: torch.Tensor | float = 0.0
    correct: torch.Tensor | int | None = 0
    weight: int = 0
    tokens: int = 0

    def add(self, loss: Loss, *, batch: MicroBatch) -> None:
        """Count one forward pass; one of weight 0 was run for the other ranks' sake only."""
        if not batch.weight:
            return
        self.total = self.total + loss.total.detach().double()
        self.correct = None if self.correct is None or loss.correct is None else self.correct + loss.correct
        self.weight, self.tokens = self.weight + batch.weight, self.tokens + batch.tokens

    def read(self, *more: torch.Tensor) -> tuple[Tally, list[float]]:
        """The sums, and further figures that the device has: one transfer for all of them."""
        asked = (self.total, 0 if self.correct is None else self.correct, *more)
        device = next((figure.device for figure in asked if isinstance(figure, torch.Tensor)), torch.device("cpu"))
        figures = [torch.as_tensor(figure, dtype=torch.float64, device=device) for figure in asked]
        total, correct, *others = torch.stack(figures).detach().tolist()
        counted = None if self.correct is None else int(correct)
        return Tally(total, self.weight, self.tokens, correct=counted), others


def passes(rows: Sequence[Row], objective: Objective, *, ranks: Ranks) -> list[MicroBatch]:
    """The forward passes of this rank for its share of `rows`: as many as every other rank has."""
    mine = ranks.share(rows)
    if mine:
        return ranks.with_empty_passes(objective.micro_batches(mine))
    # Fewer rows than ranks: take part in the others' passes, and add nothing.
    return ranks.with_empty_passes([replace(batch, weight=0, tokens=0) for batch in objective.micro_batches(rows[:1])])


@dataclass
class Evaluator:
    """Looks at validation rows; when memory runs out, with half as many at a time for the rest of the attempt.

    The rows of a forward pass in training stay as they are: a validation file may hold longer rows than the training
    file, and that must not slow down the training.
    """

    objective: Objective
    reporter: Reporter
    ranks: Ranks
    rows_at_once: int = ROWS_AT_ONCE

    def evaluate(self, model: Any, rows: Sequence[Row], *, should_stop: Callable[[], bool]) -> Tally | None:
        """Loss and accuracy over `rows`; None if a stop was asked for meanwhile. Gradients and random state are kept.

        Raises:
            EvaluationTooLarge: memory runs out on one of several ranks, which cannot repeat a pass without the others.
            torch.OutOfMemoryError, MemoryError, RuntimeError: it runs out even with one row at a time, or on one of
                several hosts, whose launchers do not start their ranks again together.
        """
        while True:
            try:
                return self._evaluate(model, rows, should_stop=should_stop)
            except MAY_MEAN_MEMORY as error:
                if out_of_memory_code(error) is None or self.rows_at_once == 1 or self.ranks.nodes > 1:
                    raise
            # Outside the handler: only now are the tensors of the failed pass let go.
            self.rows_at_once //= 2
            if self.ranks.world > 1:
                raise EvaluationTooLarge(fitting=self.rows_at_once)
            self.reporter.say(
                f"Validation ran out of memory; it goes on with {self.rows_at_once} rows at a time.", level="warn"
            )

    def _evaluate(self, model: Any, rows: Sequence[Row], *, should_stop: Callable[[], bool]) -> Tally | None:
        sums = Sums()
        rows = self.objective.with_neighbours(rows)
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.objective.prepare_passes(model, self._passes(rows, until=should_stop), summed=self.ranks.summed)
                for batch in self._passes(rows, until=should_stop):
                    sums.add(self.objective.loss(model, batch), batch=batch)
            return None if should_stop() else sums.read()[0].over(self.ranks)
        finally:
            model.train()

    def _passes(self, rows: Sequence[Row], *, until: Callable[[], bool]) -> Iterator[MicroBatch]:
        """The forward passes over `rows`, laid out some at a time; cut short once `until` holds."""
        for places in group([row.tokens for row in rows], size=self.rows_at_once * self.ranks.world):
            if until():
                return
            self.reporter.alive("validation")
            yield from passes([rows[place] for place in places], self.objective, ranks=self.ranks)
