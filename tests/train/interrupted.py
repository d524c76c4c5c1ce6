"""A run that is asked to stop within a step, as a supervisor would ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import EXIT_STOPPED, Metrics
from tests.train.tiny import run
from worker.train import __main__ as program
from worker.train.reporting import Reporter


class StopAfter(Reporter):
    """Asks for a stop when the event of one step is written, as a supervisor would."""

    step = 0
    out: Path

    def write(self, event: Any, **fields: Any) -> None:
        super().write(event, **fields)
        if event is Metrics and fields["step"] == self.step:
            (self.out / "stop").touch()


def interrupt(spec: Path, out: Path, *, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, be asked to stop within step `after`, and obey; the request is taken back afterwards."""
    with monkeypatch.context() as patched:
        patched.setattr(StopAfter, "step", after)
        patched.setattr(StopAfter, "out", out, raising=False)
        patched.setattr(program, "Reporter", StopAfter)
        assert run(spec, out)[0] == EXIT_STOPPED
    (out / "stop").unlink()
