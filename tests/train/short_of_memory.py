"""The trainer with ranks whose memory is too small: `python -m tests.train.short_of_memory SPEC OUT`.

Beside SPEC lies `short.json`: {"ranks": [...], "training": rows, "evaluation": rows}, the most rows of a forward pass
that each of `ranks` has memory for.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from worker.train.__main__ import main
from worker.train.objectives.objective import Loss, MicroBatch
from worker.train.objectives.supervised import SupervisedObjective


def shorten(ranks: list[int], *, training: int, evaluation: int) -> None:
    whole_loss = SupervisedObjective.loss

    def narrow(objective: SupervisedObjective, network: torch.nn.Module, batch: MicroBatch) -> Loss:
        most = training if network.training else evaluation
        if int(os.environ["RANK"]) in ranks and len(batch.inputs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_loss(objective, network, batch)

    SupervisedObjective.loss = narrow  # type: ignore[method-assign]  # this process has no other purpose


if __name__ == "__main__":
    light_start.end()
    spec, out = Path(sys.argv[1]), Path(sys.argv[2])
    shorten(**json.loads((spec.parent / "short.json").read_text()))
    sys.exit(main(spec, out))
