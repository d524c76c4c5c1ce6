"""Reasons to give up a run that cannot end well."""

from __future__ import annotations

import math
import statistics

from shared.errors import Invalid
from worker.train.checkpoints import Progress

WATCHED_STEPS = 20  # how many first losses make the yardstick
HIGH_STEPS = 5  # how many high losses in a row end the run


class NanLoss(Invalid):
    code = "nan_loss"


class Diverged(Invalid):
    code = "loss_diverged"


def check_numbers(loss: float, grad_norm: float, *, step: int, loss_scale: float | None = None) -> None:
    """Refuse a loss or gradient that is not a number: the weights would be lost with the next update.

    Args:
        loss_scale: what float16's loss scaler multiplies with; it skips a step whose gradients overflow and halves
            itself, so only gradients that overflow without any enlargement are lost. None without a scaler.
    """
    overflow_is_skipped = loss_scale is not None and loss_scale >= 1.0
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or overflow_is_skipped):
        raise NanLoss(
            f"Step {step}: loss {loss}, gradient norm {grad_norm}. Lower learning_rate, or use bfloat16 or float32.",
            param="training.learning_rate",
        )


def check_divergence(loss: float, *, progress: Progress, worst: float) -> None:
    """Refuse a run whose loss stays far above where it began and above that of guessing.

    Args:
        worst: loss of a uniform guess, ln(vocabulary); nothing below it counts as diverged.
    """
    if len(progress.first_losses) < WATCHED_STEPS:
        progress.first_losses.append(loss)
        return
    high = loss > max(3 * statistics.median(progress.first_losses), worst)
    progress.high_losses = progress.high_losses + 1 if high else 0
    if progress.high_losses >= HIGH_STEPS:
        raise Diverged(
            f"The loss is {loss:.1f} after starting near {statistics.median(progress.first_losses):.1f}. "
            "Lower learning_rate.",
            param="training.learning_rate",
        )


class NoTrainableParameters(Invalid):
    code = "no_trainable_parameters"
