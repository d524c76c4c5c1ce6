"""The trainer of a GPU, killed while it brings a checkpoint to the disk: `python -m tests.train.killed_while_saving
SPEC OUT STEP`. It dies within the writing of the checkpoint of STEP, once a later step has ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

from shared.contract.events import Metrics
from worker.train import __main__ as program
from worker.train import checkpoints, loop
from worker.train.reporting import Reporter

LATER = threading.Event()


class Told(Reporter):
    """Notes that a step after `step` has ended."""

    step = 0

    def write(self, event: Any, **fields: Any) -> None:
        super().write(event, **fields)
        if event is Metrics and fields["step"] > self.step:
            LATER.set()


def die_in(step: int) -> None:
    settle = checkpoints.settle

    def killed(unfinished: Path, *, place: Path) -> None:
        if place.name == checkpoints.folder_name(step):
            LATER.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        settle(unfinished, place=place)

    Told.step = step
    checkpoints.settle = killed
    loop.saves_beside_steps = lambda _spec: True
    program.Reporter = Told  # type: ignore[misc]  # this process has no other purpose


if __name__ == "__main__":
    light_start.end()
    die_in(int(sys.argv[3]))
    sys.exit(program.main(Path(sys.argv[1]), Path(sys.argv[2])))
