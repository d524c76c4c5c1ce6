"""What a pipeline's log shows of a job, and what becomes of the job when the pipeline ends early."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx2
import pytest
from openai import APIConnectionError
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.console import Console
from tunepool import printing, watching
from tunepool.watching import EventLines, NotInTime, Update, WatchInterrupted

JOB = "ftjob-0193a1b2c3d4e5f60718293a4b5c6d7e"


def job(status: str, **extension: Any) -> FineTuningJob:
    return FineTuningJob.model_construct(id=JOB, status=status, tunepool=extension, fine_tuned_model=None, error=None)


def event(message: str, **data: Any) -> FineTuningJobEvent:
    kind = "metrics" if data else "message"
    return FineTuningJobEvent.model_construct(id=message, message=message, level="info", type=kind, data=data or None)


def step(number: int) -> FineTuningJobEvent:
    return event(f"Step {number}/100", step=number, total_steps=100, train_loss=1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def log_of(capsys: pytest.CaptureFixture[str], clock: Clock, *updates: tuple[float, Update]) -> list[str]:
    lines = EventLines(Console(stderr=True, width=80), clock=clock)
    for at, update in updates:
        clock.now = at
        lines.show(update)
    # Each line begins with the moment.
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def test_a_log_has_one_line_for_a_step_in_thirty_seconds_and_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    running = job("running", progress={"seconds_left": 90})
    updates = [(float(number), Update(running, (step(number),))) for number in range(1, 101)]

    assert log_of(capsys, Clock(), *updates) == [f"Step {n}/100, 1:30 left" for n in (1, 31, 61, 91, 100)]


def test_a_log_has_a_line_for_each_change_of_the_place_in_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    third = job("queued", queue={"position": 3, "blocked_by": "NO_FREE_DEVICE", "eta_low": 0, "eta_high": 3600})
    second = job("queued", queue={"position": 2, "blocked_by": None, "eta_low": None, "eta_high": None})
    unknown = job("queued", queue={"position": None})

    lines = log_of(capsys, Clock(), *((0.0, Update(one, ())) for one in (unknown, third, third, second, second)))

    assert lines == ["queued: place 3, NO_FREE_DEVICE, starts 00:00 to 01:00Z", "queued: place 2"]


def test_a_line_is_never_broken_and_never_acts_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    message = "New fine-tuned model created: ft:" + "x" * 300 + "\x1b[2J"

    (line,) = log_of(capsys, Clock(), (0.0, Update(job("running"), (event(message),))))

    assert line == message.replace("\x1b", "\ufffd")


def test_ids_are_whole_where_a_program_reads_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    context: Any = type("C", (), {"obj": type("O", (), {"as_json": False})})
    printing.show_rows(context, [{"id": JOB, "project_id": "p" * 200, "name": "n" * 200}], ("id", "project_id", "name"))

    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == [JOB, "p" * 200, "n" * 200]


class Client:
    """As much of the client as a watch uses."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.cancelled = list(answers), []
        self.fine_tuning = self.jobs = self

    def retrieve(self, _job_id: str) -> FineTuningJob:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def list_events(self, _job_id: str, **_: Any) -> list[FineTuningJobEvent]:
        return []

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


def test_a_job_that_is_not_done_in_time_goes_on_and_is_named() -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    with pytest.raises(NotInTime, match=f"running after 60 s; it goes on: tunepool watch {JOB}"):
        list(watching.follow(Client(job("running")), JOB, timeout_seconds=60, sleep=sleep, clock=clock))  # type: ignore[arg-type]


def test_a_server_that_is_away_is_told_once_and_the_watch_goes_on() -> None:
    told: list[str] = []
    away = APIConnectionError(request=httpx2.Request("GET", "http://x"))
    client: Any = Client(away, away, job("running"), away, job("succeeded"))

    statuses = [update.job.status for update in watching.follow(client, JOB, sleep=lambda _: None, tell=told.append)]

    assert statuses == ["running", "succeeded"]
    assert told == ["The server does not answer; trying for 120 s."] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("cancel", [False, True])
def test_a_signal_says_what_becomes_of_the_job(number: signal.Signals, *, cancel: bool) -> None:
    client, before = Client(job("running")), signal.getsignal(number)

    def watch() -> None:
        with watching.interruptible(client, JOB, cancel=cancel):  # type: ignore[arg-type]
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 0)  # a moment at which the handler runs

    with pytest.raises(
        WatchInterrupted, match="being cancelled" if cancel else f"goes on: tunepool watch {JOB}"
    ) as ended:
        watch()

    assert ended.value.signal == number
    assert client.cancelled == ([JOB] if cancel else [])
    assert signal.getsignal(number) == before
