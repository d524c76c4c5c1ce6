"""On a GPU the host lays out the next passes while the device still computes, unless it asks the device for a number.

Every such question on the road that CUDA takes is counted here, on a CPU, where it goes through the same operators.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.contract.events import EXIT_DONE
from tests.train.fused_road import take_the_fused_road
from tests.train.tiny import chat_rows, make_spec, run
from worker.train import loop
from worker.train.loop import TrainingRun
from worker.train.objectives import objective

# What gives the host a value, or a shape that hangs on one.
ASKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
ROOT = Path(loop.__file__).parent


class Questions(TorchDispatchMode):
    """Which of our functions, or which file of others, asked how often."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in ASKS:
            self.asked[self._who()] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _who() -> str:
        frame: Any = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        return f"{file.name}:{frame.f_code.co_name}"


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_asks_the_device_for_its_figures_once_however_many_passes_it_has(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    take_the_fused_road(monkeypatch.setattr)
    monkeypatch.setattr(objective, "optimizer_for", lambda _spec: "adamw_torch_fused")
    steps: list[tuple[int, Counter[str]]] = []
    whole = loop._one_step

    def watched(a_run: TrainingRun) -> None:
        rows = [a_run.train_rows[index] for index in a_run.plan.row_indices(a_run.progress.step)]
        passes = len(a_run.objective.micro_batches(rows))
        with Questions() as questions:
            whole(a_run)
        steps.append((passes, questions.asked))

    monkeypatch.setattr(loop, "_one_step", watched)
    spec = make_spec(
        tmp_path,
        model=model,
        rows=chat_rows(8),
        training={"packing": packing, "num_train_epochs": 1, "batch_size": 8, "max_length": 64},
        micro_batch_size=1,
    )

    assert run(spec, tmp_path / "out")[0] == EXIT_DONE
    ((passes, asked),) = steps
    assert passes > 1
    asked.pop("supervised.py:row_starts", None)  # of positions that the host has
    # transformers looks at each pass once, to see whether it needs a mask.
    mask = "find_packed_sequence_indices" if packing else "_ignore_causal_mask_sdpa"
    assert dict(asked) == {f"masking_utils.py:{mask}": passes}


def test_the_figures_of_a_step_come_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    as_list = torch.Tensor.tolist

    def told(tensor: torch.Tensor) -> Any:
        transfers.append(tensor.shape)
        return as_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", told)
    sums = loop.Sums(total=torch.tensor(3.0), correct=torch.tensor(2), weight=4, tokens=9)

    tally, (norm,) = sums.read(torch.tensor(0.5))

    assert transfers == [torch.Size([3])]
    assert (tally.loss, tally.correct, tally.tokens, norm) == (0.75, 2, 9, 0.5)
