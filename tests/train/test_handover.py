"""The real programs, started ahead: they wait without touching a device or a core, and then work as they do cold."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from shared.contract.evaluation_run import ITEM_ANSWER
from shared.contract.handover import Handover
from shared.settings import trainer_environment
from tests.patience import patience
from tests.train import test_evaluate
from tests.train.tiny import losses, make_spec, read_events, run
from worker.host.seating import SPARE_BYTES
from worker.program import spare
from worker.program.launcher import NO_WALLS, Exit
from worker.program.processes import TAG
from worker.program.spare import Spare


def started_ahead(module: str, tmp_path: Path) -> Spare:
    return spare.start(
        module,
        place=tmp_path / "spare",
        home=tmp_path,
        environment=lambda tag, _out: trainer_environment(**{TAG: str(tag), "CUDA_VISIBLE_DEVICES": ""}),
        uid=None,
        isolation=NO_WALLS,
    )


def wait_for_ready(started: Spare) -> None:
    deadline = time.monotonic() + patience(120)
    while not started.ready:
        assert started.fault() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def work_ended(started: Spare, work: Handover) -> Exit:
    trainer = started.hand_over(work, interrupt=lambda: None)
    deadline = time.monotonic() + patience(120)
    while trainer.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return trainer.end(grace_seconds=0)


def test_a_trainer_that_was_started_ahead_trains_as_one_that_starts_cold(model: Path, tmp_path: Path) -> None:
    started = started_ahead("worker.train", tmp_path)
    try:
        wait_for_ready(started)
        computed = sum(psutil.Process(started.pid).cpu_times()[:2])
        held = started.held_bytes
        spec = make_spec(tmp_path, model=model)
        code, cold = run(spec, tmp_path / "out")
        idle = sum(psutil.Process(started.pid).cpu_times()[:2]) - computed

        ended = work_ended(started, Handover(spec=str(spec), out=str(started.folder.out)))
        warm = read_events(started.folder.out)
    finally:
        started.remove()

    assert (code, ended.code) == (0, 0), ended.last_words
    assert losses(warm) == pytest.approx(losses(cold))
    assert losses(warm)
    assert held < SPARE_BYTES
    assert idle < 0.5


def test_an_evaluation_that_was_started_ahead_answers_as_one_that_starts_cold(model: Path, tmp_path: Path) -> None:
    started = started_ahead("worker.train.evaluate", tmp_path)
    try:
        wait_for_ready(started)
        held = started.held_bytes
        code, cold = test_evaluate.run(tmp_path / "cold", model, [{"place": 0}])

        ended = work_ended(started, Handover(spec=str(tmp_path / "cold" / "spec.json"), out=str(started.folder.out)))
        warm = [
            ITEM_ANSWER.validate_json(line) for line in (started.folder.out / "answers.jsonl").read_bytes().splitlines()
        ]
    finally:
        started.remove()

    assert (code, ended.code) == (0, 0), ended.last_words
    assert [one.model_copy(update={"seconds": None}) for one in warm] == [
        one.model_copy(update={"seconds": None}) for one in cold
    ]
    assert any(one.answer for one in warm)
    assert held < SPARE_BYTES
