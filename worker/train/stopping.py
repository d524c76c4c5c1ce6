"""How the outside asks for checkpoint-and-stop: the file `OUT/stop`, or SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path

from worker.train.ranks import Ranks


class StopRequest:
    """Asked between steps; never interrupts one. With several ranks all must ask at the same places: they agree."""

    def __init__(self, out: Path, *, ranks: Ranks) -> None:
        self._file = out / "stop"
        self._ranks = ranks
        self._signalled = False

    def listen(self) -> StopRequest:
        """Take SIGTERM as a request instead of an end. Main thread only (Python's rule for signal handlers)."""
        signal.signal(signal.SIGTERM, lambda _number, _frame: self.ask())
        return self

    def ask(self) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._ranks.any(self._signalled or self._file.exists())


class TraineeStop(StopRequest):
    """That of one run among several in a process: its own file, or a request to all of them."""

    def __init__(self, out: Path, *, everybody: StopRequest) -> None:
        super().__init__(out, ranks=Ranks())
        self._everybody = everybody

    def __bool__(self) -> bool:
        return super().__bool__() or bool(self._everybody)


class StoppedOnRequest(Exception):
    """No error: the asked-for end of an attempt, raised after its checkpoint is complete."""
