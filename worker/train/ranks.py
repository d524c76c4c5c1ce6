"""Several processes on one job: who this one is, what it takes of a step, and what it agrees on with the others.

Every rank holds everything that learns and sees the same plan. A step's rows are dealt out, each rank sums the
gradients of its own, and one sum over the ranks ends the step: the update is that of one process with the whole step,
whatever the number of ranks. Upstream's DDP wrapper is not used: it averages over ranks rather than over labelled
tokens, and waits for ever when ranks have unlike numbers of forward passes, as packed rows do.
"""

from __future__ import annotations

import ctypes
import datetime
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed

from shared.contract.spec import AttemptSpec
from worker.train.data import Row
from worker.train.objectives.objective import MicroBatch

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_BUCKET_BYTES: Final = 64 * 2**20  # gradients that are summed in one message
# Ranks wait while the first one writes a checkpoint; one that died is noticed by its launcher at once.
_PATIENCE: Final = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. The default is the only one: every method then does nothing."""

    rank: int = 0
    world: int = 1
    nodes: int = 1

    @classmethod
    def join(cls, spec: AttemptSpec) -> Ranks:
        """Meet the other ranks, as torchrun's environment says; a job of one device is alone.

        Raises:
            RuntimeError: the number of ranks is not what the placement asks for.
        """
        placement = spec.job.placement
        if placement.strategy == "single":
            return cls()
        # torchrun starts ranks in sessions of their own: without this they would outlive a launcher that is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if not torch.distributed.is_initialized():
            if spec.device == "cuda":
                torch.cuda.set_device(torch.distributed.get_node_local_rank())
            backend = "cpu:gloo,cuda:nccl" if spec.device == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        ranks = cls(rank=rank, world=world, nodes=placement.nodes)
        if ranks.world != placement.gpus * placement.nodes:
            raise RuntimeError(f"{ranks.world} ranks met, and the placement has {placement.gpus} x {placement.nodes}")
        return ranks

    def leave(self) -> None:
        """Part in order; only after a run that ended well, for it waits for the others."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and tells."""
        return self.rank == 0

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This rank's part of `rows`: dealt out by length, so that all ranks have about the same work."""
        if self.world == 1:
            return list(rows)
        dealt = sorted(range(len(rows)), key=lambda place: (-rows[place].tokens, place))
        there_and_back = (self.rank, 2 * self.world - 1 - self.rank)
        mine = [place for turn, place in enumerate(dealt) if turn % (2 * self.world) in there_and_back]
        return [rows[place] for place in sorted(mine)]

    def with_empty_passes(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """`batches`, filled up with empty copies of the last one until every rank has as many forward passes.

        A sharded base is put together in each pass by all ranks: all must take part.
        """
        lacking = self.most(len(batches)) - len(batches)
        return [*batches, *[replace(batches[-1], weight=0, tokens=0)] * lacking]

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return int(self._reduced([number], torch.distributed.ReduceOp.MAX)[0])

    def any(self, flag: bool) -> bool:
        """Whether it holds for any rank. Every rank must ask."""
        return bool(self.most(int(flag)))

    def summed(self, *numbers: float) -> list[float]:
        """Each of `numbers`, summed over the ranks."""
        return self._reduced(numbers, torch.distributed.ReduceOp.SUM)

    def wait(self) -> None:
        """Until every rank has come here."""
        self.most(0)

    def gathered(self, what: Any) -> list[Any]:
        """`what` of every rank, in order."""
        if self.world == 1:
            return [what]
        answers: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(answers, what)
        return answers

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of all ranks in place; one that a rank lacks counts as zero."""
        if self.world == 1:
            return
        for bucket in _buckets([parameter for parameter in parameters if parameter.requires_grad]):
            grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            for parameter, part in zip(bucket, flat.split([grad.numel() for grad in grads]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    @torch.no_grad()
    def agree_on(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the first one's values."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(numbers)
        figures = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: gloo carries figures, NCCL gradients
        torch.distributed.all_reduce(figures, operation)
        return [float(figure) for figure in figures]


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterable[list[torch.nn.Parameter]]:
    """Neighbours of one type, up to a message's size together."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        full = sum(member.nbytes for member in bucket) + parameter.nbytes > _BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
