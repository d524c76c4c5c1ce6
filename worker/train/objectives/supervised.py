# ruff: noqa: N803, N806 -- shape suffixes, legend in the docstring
"""Next-token loss on labelled tokens, over TRL's SFTTrainer.

Shapes: B = sequences of a forward pass, L = its padded or packed length, K = positions that predict a labelled token,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from trl import SFTConfig, SFTTrainer

from shared.contract.methods import METHODS
from shared.contract.passes import PACKED_TOKENS, is_packed
from shared.contract.spec import AttemptSpec
from worker.train import row_attention
from worker.train.cpu_kernels import load
from worker.train.cpu_parts import Nll, kernels_serve
from worker.train.data import TokenRow
from worker.train.objectives.objective import Loss, MicroBatch, OwnFigures, RowwiseLoss, on_device, trainer_arguments
from worker.train.packing import group, pack
from worker.train.shared_beginning import Beginnings

IGNORED = -100


class LabelledTokenTrainer(SFTTrainer, OwnFigures):
    """SFTTrainer that projects on a CPU only those hidden states that predict a labelled token.

    TRL's fused head does that on CUDA; on a CPU it projects every position and folds three statistics (TRL 1.16,
    kernels/chunked_logprob.py). `logits_to_keep` is the public way to ask a model for some positions only.
    """

    correct_tokens: torch.Tensor | int = 0
    by_kernels = False  # the loss from ours, on a CPU (cpu_parts.py)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Cross-entropy summed over labelled tokens and divided by `num_items_in_batch` (1 when not given)."""
        assert not return_outputs, "our loop asks for no logits"
        assert not self.aux_loss_enabled, "a router's loss is off in every model that is loaded"
        reads = {name: value for name, value in inputs.items() if name != "labels"}
        if self.by_kernels:
            nll, self.correct_tokens = self._loss_by_kernels(model, reads, inputs["labels"])
        elif self.args.device.type == "cpu":
            nll, self.correct_tokens = _labelled_loss(model, reads, inputs["labels"])
        else:
            nll, self.correct_tokens = fused_loss(model, reads, inputs["labels"])
        return nll if num_items_in_batch is None else nll / num_items_in_batch

    def _loss_by_kernels(
        self, model: Any, reads: dict[str, Any], labels_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_labelled_loss`. The logits stay in their type: accelerate's wrapper would make them float32."""
        with self.accelerator.autocast():
            logits_NV, targets_N = _labelled(partial(type(model).forward, model), reads, labels_BL)
        nll, correct = Nll.apply(logits_NV, targets_N)
        return nll, correct


def _labelled_loss(model: Any, reads: dict[str, Any], labels_BL: torch.Tensor) -> tuple[torch.Tensor, int]:
    return labelled_nll(*_labelled(model, reads, labels_BL))


def _labelled(
    forward: Callable[..., Any], reads: dict[str, Any], labels_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at positions that predict a labelled token, and those tokens."""
    targets_BL = labels_BL[:, 1:]
    keep_K = (targets_BL != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits_BKV = forward(**reads, use_cache=False, logits_to_keep=keep_K).logits
    logits_NV, targets_N = logits_BKV.flatten(0, 1), targets_BL[:, keep_K].flatten()
    labelled = targets_N != IGNORED
    if bool(labelled.all()):
        return logits_NV, targets_N
    return logits_NV[labelled], targets_N[labelled]  # padded batches: a column is kept when any of its rows is labelled


def fused_loss(model: Any, reads: dict[str, Any], labels_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, and how many labelled tokens are the argmax, from TRL's fused head.

    TRL's own `compute_loss` asks the device for four figures in each pass, for a log; here they stay on it.
    """
    outputs = model(**reads, use_cache=False, labels=labels_BL, fused_lm_head=True)  # zero where there is no label
    return -outputs.log_probs.sum(), outputs.is_top1.sum()


class _SummedNll(torch.autograd.Function):
    """Cross-entropy whose backward reuses the softmax of the forward pass: one (K, V) buffer instead of three."""

    @staticmethod
    def forward(ctx: Any, logits_KV: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
        log_probs_KV = torch.log_softmax(logits_KV, dim=-1, dtype=torch.float32)
        nll = -log_probs_KV.gather(1, targets_K[:, None]).sum()
        if ctx.needs_input_grad[0]:
            grad_KV = log_probs_KV.exp_()
            grad_KV.scatter_add_(1, targets_K[:, None], grad_KV.new_full((len(targets_K), 1), -1.0))
            ctx.save_for_backward(grad_KV.to(logits_KV.dtype))
        return nll

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_KV,) = ctx.saved_tensors
        return grad_KV * grad, None


def labelled_nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy in float32 over targets that are not IGNORED, and how many of them are the argmax."""
    labelled = targets_N != IGNORED
    if not bool(labelled.all()):  # padded batches: a column is kept when any of its rows is labelled
        logits_NV, targets_N = logits_NV[labelled], targets_N[labelled]
    correct = int((logits_NV.detach().argmax(dim=-1) == targets_N).sum())
    return _SummedNll.apply(logits_NV, targets_N), correct


class SupervisedObjective(RowwiseLoss):
    """Packs or pads token rows, and sums their loss."""

    def __init__(self, trainer: LabelledTokenTrainer, *, spec: AttemptSpec, pad_id: int) -> None:
        self.trainer = trainer
        self._spec = spec
        self._pad_id = pad_id
        # DoRA does arithmetic of its own on what it is given, in that precision.
        dora = METHODS[spec.job.adapter.method].magnitude
        self._narrow = spec.job.training.dtype != "float32" and not dora
        self._packing = is_packed(spec.job)
        self._varlen = spec.device == "cuda" and "varlen_attention" not in spec.without
        self._beginnings = Beginnings(trainer.model, spec)

    def micro_batches(self, rows: Sequence[TokenRow]) -> list[MicroBatch]:
        lengths = [row.tokens for row in rows]
        if self._packing:
            return [
                self._packed([rows[index] for index in indices])
                for indices in pack(lengths, capacity=self._capacity(lengths))
            ]
        size = self._spec.micro_batch_size
        return [
            padded([rows[index] for index in indices], pad_id=self._pad_id) for indices in group(lengths, size=size)
        ]

    def sequences(self, rows: Sequence[TokenRow]) -> int:
        lengths = [row.tokens for row in rows]
        return len(pack(lengths, capacity=self._capacity(lengths))) if self._packing else len(rows)

    def loss(self, model: Any, batch: MicroBatch) -> Loss:
        # SFTTrainer.compute_loss writes into the dict it is given.
        inputs = on_device(batch.inputs, self._spec)
        if "position_ids" in inputs and self.trainer.model.config._attn_implementation == row_attention.NAME:
            starts = row_starts(batch.inputs["position_ids"])
            inputs[row_attention.ROW_STARTS] = starts
            if self._varlen:
                inputs |= on_device({row_attention.STARTS_ON_DEVICE: starts.int()}, self._spec)
        # Under autocast every product rounds its inputs to bfloat16 or float16. PEFT raises them to the adapter's
        # float32 before, which changes no bit and copies each layer's activations twice.
        with disable_input_dtype_casting(self.trainer.model, active=self._narrow):
            total = self.trainer.compute_loss(model, inputs)
        return Loss(total=total, correct=self.trainer.correct_tokens)

    def _packed(self, rows: Sequence[TokenRow]) -> MicroBatch:
        return packed(rows, shared=self._beginnings.shared_tokens(rows))

    def _capacity(self, lengths: Sequence[int]) -> int:
        asked = self._spec.micro_batch_size * self._spec.job.training.max_length
        return max(*lengths, min(asked, self._spec.pass_tokens or PACKED_TOKENS[self._spec.device]))


def packed(rows: Sequence[TokenRow], *, shared: int = 0) -> MicroBatch:
    """Rows end to end in one sequence; positions restart at each row, and transformers masks across the restarts.

    Args:
        shared: so many tokens are the same at the start of every row, and stand once, before all of them. The position
            of each row's first token is then `shared`.
    """
    whole, rests = rows[0], rows[1:]
    ids = np.concatenate([whole.ids, *(row.ids[shared:] for row in rests)])
    labelled = np.concatenate([whole.labelled, *(row.labelled[shared:] for row in rests)])
    positions = np.concatenate([np.arange(whole.tokens), *(np.arange(shared, row.tokens) for row in rests)])
    tokens = sum(row.tokens for row in rows)
    return _micro_batch(ids[None], labelled[None], tokens=tokens, position_ids=torch.from_numpy(positions)[None])


def row_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Where each packed row begins, and where the last one ends. What lies before the first, all rows share."""
    (places,) = position_ids
    restarts = (places.diff() != 1).nonzero().flatten() + 1
    shared = places[restarts[:1]] if len(restarts) else places[:1]
    return torch.cat([shared, restarts, restarts.new_tensor([len(places)])])


def padded(rows: Sequence[TokenRow], *, pad_id: int) -> MicroBatch:
    """Rows under each other, filled up at the right."""
    length = max(row.tokens for row in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int32)
    labelled = np.zeros((len(rows), length), dtype=np.bool_)
    attended = np.zeros((len(rows), length), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : row.tokens] = row.ids
        labelled[place, : row.tokens] = row.labelled
        attended[place, : row.tokens] = 1
    return _micro_batch(ids, labelled, tokens=int(attended.sum()), attention_mask=torch.from_numpy(attended))


def _micro_batch(ids: Any, labelled: Any, *, tokens: int, **reads: torch.Tensor) -> MicroBatch:
    input_ids = torch.from_numpy(ids.astype(np.int64))
    labels = input_ids.masked_fill(~torch.from_numpy(labelled), IGNORED)
    inputs = {"input_ids": input_ids, "labels": labels, **reads}
    return MicroBatch(inputs=inputs, weight=int(labelled.sum()), tokens=tokens)


def build(model: Any, tokenizer: Any, *, spec: AttemptSpec, out: Path, total_steps: int) -> SupervisedObjective:
    """The trainer sees one stand-in row: the loop feeds it our own micro-batches, so TRL prepares no data."""
    arguments = SFTConfig(
        **trainer_arguments(spec, out=out, total_steps=total_steps),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = LabelledTokenTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        processing_class=tokenizer,
    )
    trainer.by_kernels = kernels_serve(spec) and load() is not None
    return SupervisedObjective(trainer, spec=spec, pad_id=tokenizer.pad_token_id)
