"""How long a job will train and hold its devices: from finished jobs, else from arithmetic. Pure.

What finished jobs took is read by `measurements`.

Arithmetic: a token costs 2 operations per parameter forward, and 2 more to carry the gradient back through frozen
weights. It costs 2 more where every weight has a gradient of its own, and 2 more where activations are computed twice
(Kaplan et al., arXiv 2001.08361, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from shared.contract.methods import METHODS
from shared.contract.spec import JobSpec, MethodName, Training

# Dense 16-bit tensor operations a second by a part of the device's name: vendors' data sheets. First match counts.
PEAK: Final = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("GB10", 125e12),
    ("PRO 6000", 503e12),
    ("5090", 210e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("6000 Ada", 364e12),
    ("4090", 165e12),
    ("A6000", 155e12),
    ("A10", 125e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("3090", 71e12),
    ("T4", 65e12),
)
REACHED: Final = 0.3  # of the peak, by small batches of an adapter
FOUR_BIT_COST: Final = 1.3  # dequantising in every pass
GUESS: Final = 2.0  # arithmetic may be off by this factor either way
MEASURED: Final = 1.3  # finished jobs of the kind scatter so
NEAREST: Final = 5  # past jobs in size that say how long devices are held: a short one is mostly loading of the base


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of training, without waiting, loading and publishing."""

    expected: float
    low: float
    high: float
    basis: str


def predict(spec: JobSpec, *, tokens: float, device_name: str, speeds: Sequence[float]) -> Duration | None:
    """Seconds that `tokens` trained tokens take; None when neither finished jobs nor the device's name tell.

    Args:
        tokens: over the whole run.
        speeds: tokens a second of finished jobs of this base model and method on such devices.
    """
    if speeds:
        return _around(tokens / median(speeds), MEASURED, f"{len(speeds)} finished jobs of this kind")
    peak = next((rate for name, rate in PEAK if name in device_name), None)
    if peak is None:
        return None
    world = spec.placement.gpus * spec.placement.nodes
    seconds = tokens * operations_per_token(spec) / (peak * REACHED * world)
    return _around(seconds, GUESS, f"arithmetic alone: {REACHED:.0%} of {peak / 1e12:.0f} teraoperations a second")


def held_seconds(spec: JobSpec, *, ended: Sequence[tuple[JobSpec, float]]) -> float | None:
    """Seconds that a job will hold its devices, loading and publishing included; None while none like it has ended.

    The median rate (device-seconds per character trained) of the jobs nearest in size, of the same method
    where there are any, else of the same base model.

    Args:
        ended: finished jobs of the base model and their device-seconds.
    """
    alike = [pair for pair in ended if pair[0].adapter.method == spec.adapter.method] or ended
    if not alike:
        return None
    wanted = characters(spec)
    nearest = sorted(alike, key=lambda pair: abs(math.log(characters(pair[0]) / wanted)))[:NEAREST]
    rate = median(device_seconds / characters(past) for past, device_seconds in nearest)
    return float(rate * wanted) / (spec.placement.gpus * spec.placement.nodes)


def characters(spec: JobSpec) -> float:
    """Characters that a job trains on, over all its passes; at least one."""
    training, data = spec.training, spec.data
    rows = data.train_rows * training.num_train_epochs
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.batch_size)
    return max(1.0, rows * max(1.0, data.mean_characters))


def operations_per_token(spec: JobSpec) -> float:
    """Floating-point operations that training on one token takes."""
    method = METHODS[spec.adapter.method]
    facts = spec.base_model.facts
    passes = own_passes(spec.adapter.method) + _recomputed_share(spec.training, layers=facts.num_hidden_layers)
    cost = FOUR_BIT_COST if method.quantized else 1.0
    return 2.0 * passes * (facts.active_parameters or facts.parameters) * cost


def own_passes(method: MethodName) -> int:
    """How often each weight is used for a token where nothing is computed twice: 2 operations each time."""
    return 2 if METHODS[method].adapter else 3


def _recomputed_share(training: Training, *, layers: int) -> float:
    """Of a forward pass, what is computed a second time."""
    if not training.gradient_checkpointing:
        return 0.0
    return min(1.0, (training.gradient_checkpointing_layers or layers) / layers)


def _around(seconds: float, factor: float, basis: str) -> Duration:
    return Duration(round(seconds, 1), round(seconds / factor, 1), round(seconds * factor, 1), basis)
