# ruff: noqa: N803, N806 -- shape suffixes, legend in the docstring
"""ORPO and SimPO: preference pairs without a reference model.

The losses are TRL's (1.16, `trl.experimental.orpo` and `.cpo` with loss_type simpo and cpo_alpha 0); tests hold them
against TRL's own trainers. The log-probabilities come from TRL's fused head, which never holds the logits of a pass:
TRL's experimental trainers hold them all, in float32.

Shapes: P = pairs of a forward pass, B = 2P sequences (chosen first), L = their padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model

from shared.contract.spec import AttemptSpec, Orpo, Simpo
from worker.train.objectives.dpo import PairsObjective
from worker.train.objectives.objective import OwnFigures, trainer_arguments

IGNORED = -100
# (log-probabilities of the tokens (B, L-1), which belong to an answer, which have one at all) → loss of each pair.
PairLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# A mean log-probability of exactly 0 has infinite odds. It is rounding: no model is that sure.
_SUREST = -torch.finfo(torch.float32).eps


class PairTrainer(SFTTrainer, OwnFigures):
    """SFTTrainer, for its fused head, whose loss compares the two answers of each row."""

    pair_loss: PairLoss
    learns_prompts = False  # those of chosen answers carry loss too

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of the pairs of a pass."""
        del return_outputs, num_items_in_batch
        scored_BL = inputs["completion_mask"].clone()
        if self.learns_prompts:
            chosen = len(scored_BL) // 2
            scored_BL[:chosen] = inputs["attention_mask"][:chosen]
        labels_BL = inputs["input_ids"].masked_fill(scored_BL == 0, IGNORED)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=labels_BL,
            fused_lm_head=True,
        )
        answered_BL = inputs["completion_mask"][:, 1:]
        return self.pair_loss(outputs.log_probs.float(), answered_BL, scored_BL[:, 1:]).mean()


def mean_over(values_BL: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
    """(B,): the mean of each sequence over the positions that count."""
    return (values_BL * counted_BL).sum(dim=1) / counted_BL.sum(dim=1).clamp(min=1)


def orpo_loss(beta: float) -> PairLoss:
    """Next-token loss of prompt and chosen answer, less beta times the log-odds ratio's log-sigmoid (arXiv 2403.07691).

    The next-token loss is a mean over the tokens of a row. TRL takes it over the tokens of a pass, so that its curve
    follows the size of a pass; in a pass of one row both are the same.
    """

    def loss(log_probs_BL: torch.Tensor, answered_BL: torch.Tensor, scored_BL: torch.Tensor) -> torch.Tensor:
        chosen, rejected = mean_over(log_probs_BL, answered_BL).clamp(max=_SUREST).chunk(2)
        log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        next_token = -mean_over(log_probs_BL, scored_BL).chunk(2)[0]
        return next_token - beta * logsigmoid(log_odds)

    return loss


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0."""
    return torch.log(-torch.expm1(x))


def simpo_loss(beta: float, gamma: float) -> PairLoss:
    """-log sigmoid(beta · (mean log-probability of chosen less that of rejected) - gamma) (arXiv 2405.14734)."""

    def loss(log_probs_BL: torch.Tensor, answered_BL: torch.Tensor, _scored_BL: torch.Tensor) -> torch.Tensor:
        chosen, rejected = mean_over(log_probs_BL, answered_BL).chunk(2)
        return -logsigmoid(beta * (chosen - rejected) - gamma)

    return loss


def build(model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> PairsObjective:
    """The trainer sees one stand-in row: the loop feeds it our own micro-batches."""
    arguments = SFTConfig(
        **trainer_arguments(spec, out=out, total_steps=total_steps), dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = PairTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        processing_class=tokenizer,
    )
    objective = spec.job.objective
    if isinstance(objective, Orpo):
        trainer.pair_loss, trainer.learns_prompts = orpo_loss(objective.beta), True
    else:
        assert isinstance(objective, Simpo)
        trainer.pair_loss = simpo_loss(objective.beta, objective.gamma)
    disable_dropout_in_model(model)  # as in TRL's configs: the two answers of a row are compared, not two dropouts
    return PairsObjective(trainer, spec=spec)
