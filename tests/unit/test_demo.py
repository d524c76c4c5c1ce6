"""The demo never falls silent, and learns from as many tickets as this machine trains on in a few minutes."""

from __future__ import annotations

import io
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tunepool.watching import Update

from examples import demo, pace, stack, tickets
from examples.life import QUIET_SECONDS, Pulse, Voice
from examples.milestones import Milestones


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def voice(clock: Clock, log: io.StringIO) -> Voice:
    return Voice(clock=clock, file=log, force_terminal=False, width=200)


def test_a_long_act_says_how_it_stands_whenever_nothing_was_said_for_long(
    voice: Voice, clock: Clock, log: io.StringIO
) -> None:
    pulse = Pulse(voice, clock=clock)

    for _ in range(4):
        clock.now += QUIET_SECONDS / 2
        pulse.beat(lambda: "Fetching: 40 MB", began=100.0)
    voice.print("an event")
    clock.now += QUIET_SECONDS / 2
    pulse.beat(lambda: "Fetching: 80 MB", began=100.0)

    assert log.getvalue().splitlines() == ["… Fetching: 40 MB, 8 s", "… Fetching: 40 MB, 16 s", "an event"]
    assert QUIET_SECONDS < 10


def test_a_pulse_ends_with_its_act(voice: Voice) -> None:
    with pytest.raises(ValueError, match="over"), Pulse(voice).during(lambda: "x"):
        raise ValueError("over")


@pytest.mark.parametrize(("step_seconds", "expected"), [(0.2, None), (2.5, None), (2.6, 320), (7.7, 320), (60.0, 320)])
def test_a_slow_machine_learns_from_fewer_tickets(step_seconds: float, expected: int | None) -> None:
    assert pace.fewer(step_seconds) == expected


def test_the_choice_is_explained_with_what_fewer_tickets_cost() -> None:
    words = pace.words(7.7, 320)

    assert "7.7 s" in words
    assert "480 tickets would take 12 minutes" in words
    assert "320 of them, about 8 minutes" in words
    assert "100 % after 480, 88 % after 320, 35 % after 160" in words


def test_tickets_are_of_whole_steps_and_all_are_the_rows() -> None:
    assert tickets.ROWS["train"] == pace.ALL
    assert pace.ALL % pace.BATCH == pace.FEWER % pace.BATCH == 0


def metrics(step: int) -> Any:
    return SimpleNamespace(data={"train_loss": 0.5, "step": step}, message=f"Step {step}", type="metrics", level="info")


def test_a_step_is_timed_by_those_after_the_first_that_was_seen(clock: Clock) -> None:
    milestones = Milestones(clock=clock)
    told = []
    for step in (2, 3, 4, 5, 6):
        clock.now += 7.0
        milestones.note(Update(SimpleNamespace(status="running"), (metrics(step),)))  # type: ignore[arg-type]
        told.append(milestones.step_seconds(steps=4))

    assert told == [None, None, None, None, 7.0]


class Server:
    """A client whose jobs take `step_seconds` a step, until they are cancelled or have ended."""

    def __init__(self, clock: Clock, step_seconds: float) -> None:
        self.clock, self.step_seconds = clock, step_seconds
        self.rows: dict[str, int] = {}
        self.jobs: list[Any] = []
        self.files = SimpleNamespace(create=self._upload)
        self.fine_tuning = SimpleNamespace(jobs=SimpleNamespace(create=self._submit, cancel=self._cancel))

    def _upload(self, *, file: Path, purpose: str) -> Any:
        self.rows[file.name] = len(file.read_text(encoding="utf-8").splitlines())
        return SimpleNamespace(id=file.name)

    def _submit(self, *, training_file: str, **_: Any) -> Any:
        self.jobs.append(
            SimpleNamespace(id=f"job-{len(self.jobs)}", status="running", file=training_file, model_extra={})
        )
        return self.jobs[-1]

    def _cancel(self, job_id: str) -> None:
        next(job for job in self.jobs if job.id == job_id).status = "cancelled"

    def follow(self, _client: Any, job_id: str, *, interval_seconds: float) -> Iterator[Update]:
        job = next(job for job in self.jobs if job.id == job_id)
        for step in range(1, self.rows[job.file] // pace.BATCH + 1):
            self.clock.now += self.step_seconds
            yield Update(job, (metrics(step),))
            if job.status == "cancelled":
                yield Update(job, ())
                return
        job.status = "succeeded"
        yield Update(job, ())


@pytest.mark.parametrize(("step_seconds", "trained"), [(1.5, [480]), (7.7, [480, 320])])
def test_a_job_that_would_take_too_long_is_cancelled_and_a_smaller_one_submitted(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    voice: Voice,
    clock: Clock,
    *,
    step_seconds: float,
    trained: list[int],
) -> None:
    server = Server(clock, step_seconds)
    monkeypatch.setattr(demo, "console", voice)
    monkeypatch.setattr(demo, "pulse", Pulse(voice, clock=clock))
    monkeypatch.setattr(demo, "follow", server.follow)
    monkeypatch.setattr(demo, "Milestones", lambda: Milestones(clock=clock))

    job, milestones = demo.train(server, tickets.write(tmp_path))  # type: ignore[arg-type]

    assert [server.rows[one.file] for one in server.jobs] == trained
    assert [one.status for one in server.jobs] == ["cancelled"] * (len(trained) - 1) + ["succeeded"]
    assert job.status == "succeeded"
    assert [one.last_step for one in milestones][-1] == trained[-1] // pace.BATCH
    assert len(milestones) == len(trained)


def test_without_a_terminal_the_state_of_a_job_is_told_in_words() -> None:
    running, queued = (SimpleNamespace(status=status) for status in ("running", "queued"))
    milestones = Milestones()
    before = [demo.standing(Update(job, ()), milestones) for job in (queued, running)]  # type: ignore[arg-type]
    milestones.note(Update(running, (metrics(3),)))  # type: ignore[arg-type]

    assert before == ["queued", "running: its model loads"]
    assert demo.standing(Update(running, ()), milestones) == "running: step 3 is done"  # type: ignore[arg-type]


def server_that(does: str, folder: Path) -> Path:
    """A `tunepool-server` that is a line of shell."""
    server = folder / "tunepool-server"
    server.write_text(f"#!/bin/sh\n{does}\n")
    server.chmod(0o755)
    return server


def test_a_command_beside_the_start_is_waited_for_and_its_failure_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stack, "SERVER", server_that('test "$1" = models && echo fetched', tmp_path))

    with stack.started_command("models", home=tmp_path) as fetched:
        assert fetched() == "fetched"
    with stack.started_command("nothing", home=tmp_path) as fails, pytest.raises(subprocess.CalledProcessError):
        fails()


def test_a_command_beside_the_start_ends_with_whoever_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    monkeypatch.setattr(
        stack, "SERVER", server_that(f"echo $$ > {begun}.new; mv {begun}.new {begun}; sleep 600", tmp_path)
    )

    with stack.started_command("models", home=tmp_path):
        while not begun.exists():
            time.sleep(0.01)

    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
