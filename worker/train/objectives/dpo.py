"""Preference pairs over TRL's DPOTrainer. The reference is the same model at its start: never a copy of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from shared.contract.spec import AttemptSpec, Dpo
from worker.train.data import AnswersRow
from worker.train.objectives.objective import Loss, MicroBatch, OwnFigures, RowwiseLoss, on_device, trainer_arguments
from worker.train.packing import group
from worker.train.parent_adapter import begins_as

# EXO is not defined without it; its authors recommend this much (arXiv 2402.00856).
_SMOOTHING = {"exo_pair": 1e-3}


class PreparedPairsTrainer(DPOTrainer, OwnFigures):
    """DPOTrainer that takes its rows as they are: they were tokenised by `worker.train.data`."""

    def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_options: Any) -> Dataset:
        return dataset


class PairsObjective(RowwiseLoss):
    """Pairs under each other, chosen first; the loss is summed over pairs."""

    def __init__(self, trainer: Trainer, *, spec: AttemptSpec) -> None:
        self.trainer = trainer
        self._spec = spec

    def micro_batches(self, rows: Sequence[AnswersRow]) -> list[MicroBatch]:
        size = self._spec.micro_batch_size
        return [
            self._batch([rows[place] for place in places]) for places in group([row.tokens for row in rows], size=size)
        ]

    def sequences(self, rows: Sequence[AnswersRow]) -> int:
        return 2 * len(rows)

    def loss(self, model: Any, batch: MicroBatch) -> Loss:
        inputs = on_device(batch.inputs, self._spec)
        return Loss(total=self.trainer.compute_loss(model, inputs) * batch.weight, correct=None)

    def _batch(self, rows: Sequence[AnswersRow]) -> MicroBatch:
        records = [
            {"prompt_ids": row.prompt_ids, "chosen_ids": row.answers[0], "rejected_ids": row.answers[1]} for row in rows
        ]
        return MicroBatch(
            inputs=self.trainer.data_collator(records), weight=len(rows), tokens=sum(row.tokens for row in rows)
        )


def refer_to_start(model: Any, *, spec: AttemptSpec) -> None:
    """Settle what TRL refers to: the frozen copy of the adapter that it makes, or the model with the adapter off.

    A new adapter adds nothing before the first step (starts that move the model are refused). So switched off it is the
    start, also on top of a parent, which stays; the copy would cost memory. An adapter that trains on from a parent's
    has learnt already: there the copy is the start, as exact as the adapter itself.
    """
    if "ref" in model.peft_config and begins_as(spec) is None:
        model.delete_adapter("ref")


def build(model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> PairsObjective:
    """The trainer sees one stand-in pair: the loop feeds it our own micro-batches."""
    assert isinstance(spec.job.objective, Dpo)
    arguments = DPOConfig(
        **trainer_arguments(spec, out=out, total_steps=total_steps),
        beta=spec.job.objective.beta,
        loss_type=[spec.job.objective.loss_type],
        label_smoothing=_SMOOTHING.get(spec.job.objective.loss_type, 0.0),
        # Dropout would make policy and reference differ by chance; off as in TRL's default.
        disable_dropout=True,
    )
    trainer = PreparedPairsTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt_ids": [[0]], "chosen_ids": [[0]], "rejected_ids": [[0]]}),
        processing_class=tokenizer,
    )
    refer_to_start(model, spec=spec)
    return PairsObjective(trainer, spec=spec)
