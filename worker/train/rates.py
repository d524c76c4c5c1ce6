"""How fast this device multiplies a training step's matrices, by dtype. `auto` chooses the dtype of a CPU by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

from shared.contract.probe_report import Arithmetic

# A packed pass of 512 tokens through a layer of a small model, 576 wide and 1536 within (SmolLM2's; others have more of
# the same). Smaller ones would measure calls, larger ones would take longer and show no other ratio.
TOKENS, WIDE, WITHIN = 512, 576, 1536
TYPES: Final[dict[Arithmetic, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS: Final = 1.0
LEAST_ROUNDS: Final = 3
GIGA: Final = 1e9


def rates(*, clock: Callable[[], float] = time.perf_counter, seconds: float = SECONDS) -> dict[Arithmetic, float]:
    """GFLOP/s by type, each at its best round.

    The types take turns, so that whatever else the machine does meets all of them; the fastest round is what it can do.
    It ends with the first round after `seconds`.
    """
    works = {name: _product(dtype) for name, dtype in TYPES.items()}
    for work in works.values():
        work()  # the first one makes threads, and packs weights
    best = dict.fromkeys(works, float("inf"))
    began, rounds = clock(), 0
    while rounds < LEAST_ROUNDS or clock() - began < seconds:
        for name, work in works.items():
            before = clock()
            work()
            best[name] = min(best[name], clock() - before)
        rounds += 1
    operations = 2 * 2 * TOKENS * WIDE * WITHIN
    return {name: operations / max(took, 1e-9) / GIGA for name, took in best.items()}


def _product(dtype: torch.dtype) -> Callable[[], object]:
    """Into a layer and out of it again, as forward passes and the gradients of activations have it."""
    rows = torch.randn(TOKENS, WIDE).to(dtype)
    into, out = torch.randn(WITHIN, WIDE).to(dtype), torch.randn(WIDE, WITHIN).to(dtype)

    def work() -> object:
        with torch.inference_mode():
            return (rows @ into.T) @ out.T

    return work
