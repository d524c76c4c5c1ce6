"""Answers labelled good or bad over TRL's KTOTrainer. The reference is the same model with its adapter disabled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from shared.spec import AttemptSpec, Kto
from worker.train.data import AnswersRow
from worker.train.objectives.dpo import refer_to_base, refuse_without_reference
from worker.train.objectives.objective import Loss, MicroBatch, trainer_arguments
from worker.train.packing import group


class PreparedAnswersTrainer(KTOTrainer):
    """KTOTrainer that takes its rows as they are: they were tokenised by `worker.train.data`."""

    def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_options: Any) -> Dataset:
        return dataset


class KtoObjective:
    """Answers under each other, each also beside its neighbour's prompt for the KL term; summed over answers."""

    def __init__(self, trainer: PreparedAnswersTrainer, *, spec: AttemptSpec) -> None:
        self.trainer = trainer
        self._spec = spec

    def micro_batches(self, rows: Sequence[AnswersRow]) -> list[MicroBatch]:
        size = self._pass_size()
        return [self._batch([rows[place] for place in one]) for one in group([row.tokens for row in rows], size=size)]

    def sequences(self, rows: Sequence[AnswersRow]) -> int:
        return len(rows)

    def loss(self, model: Any, batch: MicroBatch) -> Loss:
        inputs = {name: value.to(self._spec.device) for name, value in batch.inputs.items()}
        return Loss(total=self.trainer.compute_loss(model, inputs) * batch.weight, correct=None)

    def _pass_size(self) -> int:
        # The KL term compares answers with other rows' prompts, so a pass needs two rows at least.
        return max(2, self._spec.micro_batch_size)

    def _batch(self, rows: Sequence[AnswersRow]) -> MicroBatch:
        # Mismatched pairs by rotation, as TRL builds them (KTOTrainer._prepare_dataset; arXiv 2402.01306, section 4.2).
        records = [
            {
                "prompt_ids": row.prompt_ids,
                "completion_ids": row.answers[0],
                "KL_completion_ids": rows[place - 1].answers[0],
                "label": row.label,
            }
            for place, row in enumerate(rows)
        ]
        return MicroBatch(
            inputs=self.trainer.data_collator(records), weight=len(rows), tokens=sum(row.tokens for row in rows)
        )


def build(model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> KtoObjective:
    """The trainer sees one stand-in answer: the loop feeds it our own micro-batches."""
    refuse_without_reference(spec)
    assert isinstance(spec.job.objective, Kto)
    shared = trainer_arguments(spec, out=out, total_steps=total_steps)
    arguments = KTOConfig(
        **{**shared, "per_device_train_batch_size": max(2, spec.micro_batch_size)},
        beta=spec.job.objective.beta,
        disable_dropout=True,
        # Required with the KL term: TRL pairs neighbours. The order that counts is our plan's.
        train_sampling_strategy="sequential",
    )
    stand_in = {"prompt_ids": [[0]], "completion_ids": [[0]], "KL_completion_ids": [[0]], "label": [True]}
    trainer = PreparedAnswersTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(stand_in), processing_class=tokenizer
    )
    refer_to_base(model)
    return KtoObjective(trainer, spec=spec)
