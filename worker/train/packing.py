"""Which rows form an optimizer step, and how a step's rows are laid into forward passes.

Rows are grouped into optimizer steps *first*, and packed within a step afterwards. So every step has the same rows in
a packed run, in an unpacked one, and in one that is split again after out-of-memory. The loss is summed over a step's
labelled tokens, so all three follow the same curve. Steps per epoch = ceil(rows / batch_size).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """The rows of every optimizer step: a pure function of (rows, batch_size, epochs, seed)."""

    rows: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        planned = self.steps_per_epoch * self.epochs
        return planned if self.max_steps is None else min(planned, self.max_steps)

    def row_indices(self, step: int) -> Sequence[int]:
        """Rows of optimizer step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.rows, seed=self.seed, epoch=epoch)
        return order[within * self.batch_size : (within + 1) * self.batch_size]

    def ends_epoch(self, steps_done: int) -> bool:
        return steps_done % self.steps_per_epoch == 0 or steps_done == self.total_steps


@functools.lru_cache(maxsize=1)
def epoch_order(rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order in which one epoch visits its rows."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 -- an order, not a secret
    return tuple(order)


def pack(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: bins of indices whose lengths sum to `capacity` at most; a longer row is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        fitting = [place for place, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda place: room[place])
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


def group(lengths: Sequence[int], *, size: int) -> list[list[int]]:
    """At most `size` rows per forward pass, rows of like length together: little padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]
