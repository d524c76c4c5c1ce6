"""Answers labelled good or bad over TRL's KTOTrainer. The reference is the same model at its start (dpo.py).

The KL term compares answers with what policy and reference think of *another* row's answer to the same prompt (arXiv
2402.01306, section 4.2). Upstream takes these neighbours and the mean from one forward pass, and from the passes that
the ranks have at the same time, so that the loss would follow the size of a pass. Here both are the step's: a curve
depends neither on the micro-batch, which shrinks when memory runs out, nor on the number of ranks. The work is the
same: the term needs no gradient, so its passes only come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import KTOConfig, KTOTrainer
from trl.trainer.utils import use_adapter

from shared.contract.spec import AttemptSpec, Kto
from worker.train.data import AnswersRow
from worker.train.objectives.dpo import refer_to_start
from worker.train.objectives.objective import Loss, MicroBatch, OwnFigures, on_device, trainer_arguments
from worker.train.packing import group


@dataclass(frozen=True)
class PairedRow:
    """An answer, and a neighbour's answer that the KL term puts in its place."""

    row: AnswersRow
    neighbours: list[int]

    @property
    def tokens(self) -> int:
        return self.row.tokens


class PreparedAnswersTrainer(KTOTrainer, OwnFigures):
    """KTOTrainer that takes rows as `worker.train.data` tokenised them, and the KL term by the given pairs."""

    divergence = 0.0  # of the policy from its reference, nats per answer, over the whole step

    def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_options: Any) -> Dataset:
        return dataset

    def _compute_kl_logps(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Upstream's KL term is the policy's figure less the reference's: the divergence, and nothing."""
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        policy = not layer.disable_adapters and "ref" not in layer.active_adapters
        return torch.tensor([self.divergence * policy], device=batch["input_ids"].device)

    def summed_divergence(self, model: Any, batch: dict[str, torch.Tensor]) -> float:
        """How much likelier the neighbours' answers are under the policy than under its reference, in nats."""
        policy = super()._compute_kl_logps(model, batch)
        with use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None):
            reference = super()._compute_kl_logps(model, batch)
        return float((policy - reference).sum())


class KtoObjective:
    """Answers under each other, each also with a neighbour's answer for the KL term; summed over answers."""

    def __init__(self, trainer: PreparedAnswersTrainer, *, spec: AttemptSpec) -> None:
        self.trainer = trainer
        self._spec = spec

    def with_neighbours(self, rows: Sequence[AnswersRow]) -> Sequence[PairedRow]:
        # By rotation, as TRL does within a pass (KTOTrainer._prepare_dataset). One row alone has itself.
        return [PairedRow(row, neighbours=rows[place - 1].answers[0]) for place, row in enumerate(rows)]

    def micro_batches(self, rows: Sequence[PairedRow]) -> list[MicroBatch]:
        size = self._spec.micro_batch_size
        return [
            self._batch([rows[place] for place in places]) for places in group([row.tokens for row in rows], size=size)
        ]

    def sequences(self, rows: Sequence[AnswersRow]) -> int:
        return len(rows)

    def prepare_passes(
        self, model: Any, batches: Iterable[MicroBatch], *, summed: Callable[..., Sequence[float]]
    ) -> None:
        total = rows = 0.0
        for batch in batches:
            divergence = self.trainer.summed_divergence(model, self._inputs(batch))
            total, rows = total + divergence * (batch.weight > 0), rows + batch.weight
        total, rows = summed(total, rows)
        self.trainer.divergence = max(0.0, total / max(rows, 1))

    def loss(self, model: Any, batch: MicroBatch) -> Loss:
        return Loss(total=self.trainer.compute_loss(model, self._inputs(batch)) * batch.weight, correct=None)

    def _inputs(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return on_device(batch.inputs, self._spec)

    def _batch(self, rows: Sequence[PairedRow]) -> MicroBatch:
        records = [
            {
                "prompt_ids": item.row.prompt_ids,
                "completion_ids": item.row.answers[0],
                "KL_completion_ids": item.neighbours,
                "label": item.row.label,
            }
            for item in rows
        ]
        return MicroBatch(
            inputs=self.trainer.data_collator(records), weight=len(rows), tokens=sum(item.tokens for item in rows)
        )


def build(model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> KtoObjective:
    """The trainer sees one stand-in answer: the loop feeds it our own micro-batches."""
    assert isinstance(spec.job.objective, Kto)
    shared = trainer_arguments(spec, out=out, total_steps=total_steps)
    arguments = KTOConfig(
        # Upstream would warn of a pass of one row, which it could not take a KL term from.
        **{**shared, "per_device_train_batch_size": max(2, spec.micro_batch_size)},
        beta=spec.job.objective.beta,
        disable_dropout=True,
        # Required with the KL term, whose pairs upstream would make in the order of the file.
        train_sampling_strategy="sequential",
    )
    stand_in = {"prompt_ids": [[0]], "completion_ids": [[0]], "KL_completion_ids": [[0]], "label": [True]}
    trainer = PreparedAnswersTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(stand_in), processing_class=tokenizer
    )
    refer_to_start(model, spec=spec)
    return KtoObjective(trainer, spec=spec)
