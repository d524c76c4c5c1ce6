"""What the loop asks of an objective: forward passes for a step's rows, and their summed loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer

from shared.contract.spec import AttemptSpec


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass and its share in the optimizer step."""

    inputs: dict[str, torch.Tensor]
    weight: int  # labelled tokens (supervised) or rows (dpo, kto): losses are summed and divided by a step's total
    tokens: int  # input tokens without padding


@dataclass(frozen=True)
class Loss:
    """Summed over the units that `MicroBatch.weight` counts."""

    total: torch.Tensor  # scalar, with gradient in training
    # Labelled tokens predicted as most likely, on the device too; None where the objective has no such thing.
    correct: torch.Tensor | int | None


class Objective(Protocol):
    """One of `OBJECTIVES`; holds the TRL trainer that computes its loss."""

    trainer: Trainer

    def with_neighbours(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Pairs each row of an optimizer step (or of a validation pass) with the other rows that its loss needs."""
        ...

    def micro_batches(self, rows: Sequence[Any]) -> list[MicroBatch]:
        """Lay rows, with their neighbours, into forward passes."""
        ...

    def sequences(self, rows: Sequence[Any]) -> int:
        """How many sequences the rows of one step make: fewer than rows when packed."""
        ...

    def prepare_passes(
        self, model: Any, batches: Iterable[MicroBatch], *, summed: Callable[..., Sequence[float]]
    ) -> None:
        """Learn from all passes the figures that the loss of each needs; `summed` adds figures up over the ranks."""
        ...

    def loss(self, model: Any, batch: MicroBatch) -> Loss:
        """Run the forward pass of `batch`, one of those prepared last."""
        ...


class RowwiseLoss:
    """Objectives whose loss of a row depends on no other row."""

    def with_neighbours(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows

    def prepare_passes(
        self, _model: Any, _batches: Iterable[MicroBatch], *, summed: Callable[..., Sequence[float]]
    ) -> None:
        del summed


class OwnFigures(Trainer):
    """A trainer of TRL's whose figures stay on their rank.

    TRL gathers a dozen of them in every pass, for a log that nobody reads here; DPO one per row, which ends the
    process when ranks have unlike numbers of rows. What a step needs of all ranks is summed by `Ranks`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.gather = _kept


def _kept(figures: torch.Tensor) -> torch.Tensor:
    """As accelerate gathers in a process that is alone."""
    return figures


def optimizer_for(spec: AttemptSpec) -> str:
    """Upstream's name of the optimizer. On a GPU one kernel updates all weights that torch's AdamW trains."""
    fused = spec.device == "cuda" and "fused_optimizer" not in spec.without
    return "adamw_torch_fused" if fused and spec.job.training.optim == "adamw_torch" else spec.job.training.optim


def on_device(inputs: Mapping[str, torch.Tensor], spec: AttemptSpec) -> dict[str, torch.Tensor]:
    """Copies of what a pass reads. To a GPU they go while it still computes the pass before."""
    if spec.device == "cpu":
        return dict(inputs)
    return {name: value.pin_memory().to(spec.device, non_blocking=True) for name, value in inputs.items()}


def trainer_arguments(spec: AttemptSpec, *, out: Path, total_steps: int) -> dict[str, Any]:
    """What every TRL config shares. The loop is ours, so nothing here saves, logs or evaluates.

    Activation checkpointing stays off here: the model was set up for it before (`base_model.recompute_activations`).
    """
    training = spec.job.training
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": spec.micro_batch_size,
        "learning_rate": training.learning_rate,
        "optim": optimizer_for(spec),
        "lr_scheduler_type": training.lr_scheduler_type,
        # Steps, not a ratio: upstream reads 1.0 as one step.
        "warmup_steps": round(training.warmup_ratio * total_steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.dtype == "bfloat16",
        "fp16": training.dtype == "float16",
        "use_cpu": spec.device == "cpu",
        "gradient_checkpointing": False,
        # Losses are divided by the whole step's weight and summed over the ranks by `Ranks`. Left on, TRL's fused head
        # multiplies each loss by the number of ranks, as for gradients that DDP averages.
        "average_tokens_across_devices": False,
        # Experts: their balancing loss is off (experts.py says why).
        "router_aux_loss_coef": 0.0,
        "seed": spec.job.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }
