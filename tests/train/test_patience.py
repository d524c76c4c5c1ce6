"""A trainer that works in silence tells that it lives, so that its supervisor does not take it for stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.contract.events import EXIT_DONE, Alive, Metrics, Started
from shared.settings import Settings
from tests.lifecycle.stack import until
from tests.train.tiny import chat_rows, make_spec, run
from worker.program.trainer_events import EventsSoFar, EventTail, client_event
from worker.train import reporting
from worker.train.objectives.objective import Loss, MicroBatch, RowwiseLoss
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter, ResourceUse
from worker.train.validation import ROWS_AT_ONCE, Evaluator

FLOOR = Settings.model_fields["stall_floor_seconds"].default
FACTOR = Settings.model_fields["stall_factor"].default
STARTED: dict[str, Any] = {
    "total_steps": 9,
    "trainable_parameters": 1,
    "all_parameters": 1,
    "train_rows": 9,
    "sequences": 9,
    "train_tokens_per_epoch": 9,
    "labelled_tokens_per_epoch": 9,
}
STEP: dict[str, Any] = {
    "step": 1,
    "total_steps": 9,
    "epoch": 0.1,
    "train_loss": 1.0,
    "learning_rate": 0.1,
    "trained_tokens": 9,
    "seconds_per_step": 1.0,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Watcher:
    """A supervisor's look, as often as time passes."""

    clock: Clock
    tail: EventTail
    story: EventsSoFar
    stuck_at: list[float] = field(default_factory=list)

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            for event in self.tail.read():
                self.story.hear(event)
            if self.story.silence() > self.story.patience(factor=FACTOR, floor_seconds=FLOOR):
                self.stuck_at.append(self.clock.now)


@dataclass
class Row:
    tokens: int = 5


class SlowObjective(RowwiseLoss):
    """Every group of rows takes two thirds of the supervisor's patience."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def micro_batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        return [MicroBatch(inputs={}, weight=len(rows), tokens=len(rows))]

    def loss(self, _model: Any, _batch: MicroBatch) -> Loss:
        self.watcher.pass_time(int(FLOOR * 2 / 3))
        return Loss(total=torch.tensor(1.0), correct=0)


def test_a_validation_of_many_times_the_patience_is_not_taken_for_stuck(tmp_path: Path) -> None:
    clock, events = Clock(), tmp_path / "events.jsonl"
    reporter = Reporter(events, clock=clock, ticks=clock)
    watcher = Watcher(clock, EventTail(events), EventsSoFar(clock))
    reporter.write(Started, **STARTED)
    reporter.write(Metrics, **STEP)
    evaluator = Evaluator(SlowObjective(watcher), reporter, Ranks(rank=0, world=1))  # type: ignore[arg-type]

    tally = evaluator.evaluate(nn.Linear(1, 1), [Row()] * (6 * ROWS_AT_ONCE), should_stop=lambda: False)  # type: ignore[list-item]

    assert tally is not None
    assert clock.now > 3 * FLOOR
    assert watcher.stuck_at == []


def test_a_trainer_that_hangs_within_a_validation_is_still_taken_for_stuck(tmp_path: Path) -> None:
    clock, events = Clock(), tmp_path / "events.jsonl"
    reporter = Reporter(events, clock=clock, ticks=clock)
    watcher = Watcher(clock, EventTail(events), EventsSoFar(clock))
    reporter.write(Started, **STARTED)
    reporter.write(Metrics, **STEP)
    watcher.pass_time(20)
    reporter.alive("validation")

    watcher.pass_time(int(FLOOR) + 3)

    assert watcher.stuck_at


def test_signs_of_life_come_from_steps_and_from_each_group_of_validation_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "SIGN_SECONDS", -1.0)
    monkeypatch.setattr(reporting, "WATCH_SECONDS", 0.001)
    settings: dict[str, Any] = {"rows": chat_rows(4), "validation": chat_rows(2 * ROWS_AT_ONCE + 1)}

    code, events = run(make_spec(tmp_path, model=model, **settings), tmp_path / "out")

    assert code == EXIT_DONE
    signs = [event.doing for event in events if event.type == "alive"]
    looks = sum(event.type == "validation" for event in events)
    assert looks > 0
    assert signs.count("validation") >= 3 * looks
    assert {"loading", "step", "checkpoint"} < set(signs)


def test_signs_of_life_are_rare_and_no_client_reads_them(tmp_path: Path) -> None:
    clock, events = Clock(), tmp_path / "events.jsonl"
    reporter = Reporter(events, clock=clock, ticks=clock)
    for _second in range(100):
        clock.now += 1
        reporter.alive("step")

    signs = list(EventTail(events).read())

    assert len(signs) == 10
    assert [client_event(sign) for sign in signs if isinstance(sign, Alive)] == [None] * 10


@pytest.mark.parametrize("works", [True, False])
def test_upstreams_long_work_gives_signs_and_its_waiting_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, works: bool
) -> None:
    monkeypatch.setattr(reporting, "SIGN_SECONDS", 0.0)
    monkeypatch.setattr(reporting, "WATCH_SECONDS", 0.02)
    events, looks = tmp_path / "events.jsonl", 0
    reporter = Reporter(events, clock=time.time)

    def now() -> ResourceUse:
        nonlocal looks
        looks += 1
        return ResourceUse(cpu_seconds=looks if works else 0.0, transfers=0)

    monkeypatch.setattr(reporting.ResourceUse, "now", now)

    with reporter.working("loading"):
        until(lambda: looks >= 5)

    assert ("loading" in [event.doing for event in EventTail(events).read()]) == works


def test_work_that_is_busy_for_ever_stops_giving_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(reporting, "PHASE_SECONDS", 0.0)
    reporter = Reporter(tmp_path / "events.jsonl", clock=time.time)

    with reporter.working("loading"):
        until(lambda: not any(thread.name == "signs-of-life" for thread in threading.enumerate()))


def test_reading_writing_and_computing_are_work_and_waiting_is_none(tmp_path: Path) -> None:
    before = ResourceUse.now()
    torch.linalg.svd(torch.ones(600, 600))
    computed = ResourceUse.now()

    assert computed.works_since(before, seconds=0.1)
    assert not computed.works_since(computed, seconds=0.1)
    assert ResourceUse(cpu_seconds=1.0, transfers=2).works_since(
        ResourceUse(cpu_seconds=1.0, transfers=1), seconds=100.0
    )
