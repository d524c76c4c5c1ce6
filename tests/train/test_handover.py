"""The real trainer, started ahead: it waits without touching a device or a core, and then trains as it does cold."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from shared.contract.handover import Handover
from shared.settings import trainer_environment
from tests.patience import patience
from tests.train.tiny import losses, make_spec, read_events, run
from worker.host.seating import SPARE_BYTES
from worker.program import spare
from worker.program.launcher import NO_WALLS
from worker.program.processes import TAG


def test_a_trainer_that_was_started_ahead_trains_as_one_that_starts_cold(model: Path, tmp_path: Path) -> None:
    started = spare.start(
        "worker.train",
        place=tmp_path / "spare",
        home=tmp_path,
        environment=lambda tag, _out: trainer_environment(**{TAG: str(tag), "CUDA_VISIBLE_DEVICES": ""}),
        uid=None,
        isolation=NO_WALLS,
    )
    try:
        deadline = time.monotonic() + patience(120)
        while not started.ready:
            assert started.fault() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        computed = sum(psutil.Process(started.pid).cpu_times()[:2])
        held = started.held_bytes
        spec = make_spec(tmp_path, model=model)
        code, cold = run(spec, tmp_path / "out")
        idle = sum(psutil.Process(started.pid).cpu_times()[:2]) - computed

        trainer = started.hand_over(Handover(spec=str(spec), out=str(started.folder.out)), interrupt=lambda: None)
        while trainer.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ended = trainer.end(grace_seconds=0)
        warm = read_events(started.folder.out)
    finally:
        started.remove()

    assert (code, ended.code) == (0, 0), ended.last_words
    assert losses(warm) == pytest.approx(losses(cold))
    assert losses(warm)
    assert held < SPARE_BYTES
    assert idle < 0.5
