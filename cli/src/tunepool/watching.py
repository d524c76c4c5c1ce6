"""Follows a job by polling, so that it works against any server with OpenAI's fine-tuning API."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tunepool import official, requests
from tunepool.printing import printable

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

T = TypeVar("T")

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
PATIENCE_SECONDS: Final = 120.0  # a server that restarts is not the end of a watch
AWAY_SECONDS: Final = 0.5  # between two tries to reach it
EVENTS_PER_PAGE: Final = 100
STEP_SECONDS: Final = 30.0  # between two lines that tell of steps


@dataclass(frozen=True)
class Update:
    """The job now, and the events since the last update, oldest first."""

    job: FineTuningJob
    events: tuple[FineTuningJobEvent, ...]


def ours(job: FineTuningJob) -> dict[str, Any]:
    """The server's extension of a job; empty on servers that have none."""
    extension = (job.model_extra or {}).get("tunepool")
    return extension if isinstance(extension, dict) else {}


def follow(
    client: OpenAI,
    job_id: str,
    *,
    interval_seconds: float = 0.5,
    timeout_seconds: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Updates until the job has ended.

    Args:
        timeout_seconds: how long the job may take from now; None is without a limit.
        tell: is given a sentence when the server stops answering.

    Raises:
        openai.APIConnectionError, openai.InternalServerError: the server stays away for `PATIENCE_SECONDS`.
        NotInTime: the job has not ended after `timeout_seconds`.
    """
    last_event: str | None = None
    began = heard = clock()
    silent = False
    while True:
        try:
            job = client.fine_tuning.jobs.retrieve(job_id)
            events = _events_after(client, job_id, last_event)
        except (official.APIConnectionError, official.InternalServerError):
            if clock() - heard > PATIENCE_SECONDS:
                raise
            if not silent:
                silent = True
                tell(f"The server does not answer; trying for {PATIENCE_SECONDS:.0f} s.")
            sleep(interval_seconds)
            continue
        heard, silent = clock(), False
        last_event = events[-1].id if events else last_event
        yield Update(job, events)
        if job.status in TERMINAL:
            return
        if timeout_seconds is not None and clock() - began >= timeout_seconds:
            raise NotInTime(
                f"Job {job_id} is {job.status} after {timeout_seconds:.0f} s; it goes on: tunepool watch {job_id}"
            )
        sleep(interval_seconds)


def in_the_end(
    ask: Callable[[], T],
    *,
    tell: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """What `ask` answers, asked again while the server is away: one that restarts is not the end of a wait.

    Raises openai.APIConnectionError or openai.InternalServerError when it stays away for `PATIENCE_SECONDS`.
    """
    began, silent = clock(), False
    while True:
        try:
            return ask()
        except (official.APIConnectionError, official.InternalServerError):
            if clock() - began > PATIENCE_SECONDS:
                raise
        if not silent:
            tell(f"The server does not answer; trying for {PATIENCE_SECONDS:.0f} s.")
        silent = True
        sleep(AWAY_SECONDS)


def _events_after(client: OpenAI, job_id: str, last_event: str | None) -> tuple[FineTuningJobEvent, ...]:
    # The wire lists the newest first, so reading stops at the one that is known; pages are fetched as needed.
    newest_first = client.fine_tuning.jobs.list_events(job_id, limit=EVENTS_PER_PAGE)
    return tuple(takewhile(lambda event: event.id != last_event, newest_first))[::-1]


class WatchInterrupted(Exception):
    """SIGINT or SIGTERM ended the watch; the message says what becomes of the job."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class NotInTime(Exception):
    """The job has not ended within the time given; it goes on."""


@contextmanager
def interruptible(client: OpenAI, job_id: str, *, cancel: bool) -> Iterator[None]:
    """SIGINT, and SIGTERM which CI systems send, end the watch with a word on the job.

    Raises WatchInterrupted.
    """
    with interruptible_work(
        cancel=(lambda: client.fine_tuning.jobs.cancel(job_id)) if cancel else None,
        cancelled=f"Job {job_id} is being cancelled.",
        left=f"Job {job_id} goes on: tunepool watch {job_id}",
    ):
        yield


def _on_stderr(message: str) -> None:
    Console(stderr=True).print(printable(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def interruptible_work(
    *,
    left: str,
    cancel: Callable[[], object] | None = None,
    cancelled: str = "",
    tell: Callable[[str], None] = _on_stderr,
) -> Iterator[None]:
    """The same for any work of the server: `cancel` ends it, None leaves it. Raises WatchInterrupted.

    Args: left: a sentence: what becomes of the work when it is left alone. cancelled: the same, for when the server
    has taken `cancel`. tell: is given a sentence before the server is asked, which may take its time.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped as stopped:
        for number in before:  # no second signal cuts the cancelling short
            signal.signal(number, signal.SIG_IGN)
        words = left if cancel is None else _after_cancelling(cancel, cancelled=cancelled, left=left, tell=tell)
        raise WatchInterrupted(stopped.signal, words) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _after_cancelling(cancel: Callable[[], object], *, cancelled: str, left: str, tell: Callable[[str], None]) -> str:
    """Has the server cancel; returns what became of the work, also where the server refuses or is away."""
    tell("Stopping: waits for the server to take the cancellation.")
    try:
        cancel()
    except official.APIConnectionError:
        return f"The server does not answer: it was not cancelled. {left}"
    except official.APIStatusError as error:
        return f"The server did not cancel it: {requests.reason(error)}"
    return cancelled


class _Stopped(BaseException):
    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def display(console: Console) -> ProgressBar | EventLines:
    """A bar on a terminal, plain lines for a log."""
    return ProgressBar(console) if console.is_terminal else EventLines(console)


class EventLines:
    """For logs: a line for each event and each change of the place in the queue, and steps now and then."""

    def __init__(
        self,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self._console, self._clock, self._pause = console, clock, step_seconds
        self._step_at: float | None = None
        self._place: object = None

    def __enter__(self) -> EventLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, update: Update) -> None:
        queue = ours(update.job).get("queue") or {}
        if self._place != (line := place(queue)) and line:
            self._place = line
            self.tell(line)
        for event in update.events:
            data = event.data if isinstance(event.data, dict) else {}
            if event.type != "metrics" or "train_loss" not in data:
                self.tell(event.message)
            elif self._is_due(data):
                self.tell(f"{event.message}, {time_left(update.job)} left")

    def tell(self, message: str) -> None:
        line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {printable(message)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _is_due(self, data: dict[str, Any]) -> bool:
        last = data.get("step") == data.get("total_steps")
        due = self._step_at is None or self._clock() - self._step_at >= self._pause or last
        if due:
            self._step_at = self._clock()
        return due


def place(queue: dict[str, Any]) -> str:
    """Why the job waits, in one line; empty before the first plan, and once it runs."""
    if queue.get("blocked_by") == "CLUSTER":
        return printable(f"waits for the cluster: {queue.get('detail', '')}")
    if queue.get("position") is None:
        return ""
    words = [f"queued: place {queue['position']}"]
    if queue.get("blocked_by"):
        words.append(str(queue["blocked_by"]))
    low, high = queue.get("eta_low"), queue.get("eta_high")
    if low is not None:
        starts = f"starts {datetime.fromtimestamp(low, tz=UTC):%H:%M}"
        words.append(starts if high is None else f"{starts} to {datetime.fromtimestamp(high, tz=UTC):%H:%M}Z")
    return ", ".join(words)


class ProgressBar:
    """Step, loss and time left on one line; messages above it. A context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("submitted", total=None, loss="-", left="-")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, message: str) -> None:
        self._progress.console.print(printable(message), markup=False, highlight=False)

    def show(self, update: Update) -> None:
        for event in update.events:
            data = event.data if isinstance(event.data, dict) else {}
            if event.type == "metrics" and "train_loss" in data:
                self._progress.update(
                    self._task,
                    completed=data.get("step", 0),
                    total=data.get("total_steps"),
                    loss=f"{data['train_loss']:.4f}",
                )
            else:
                self._progress.console.print(
                    printable(event.message), style=_STYLES.get(event.level, ""), markup=False, highlight=False
                )
        waits = place(ours(update.job).get("queue") or {})
        self._progress.update(self._task, description=waits or update.job.status, left=time_left(update.job))


_STYLES: Final = {"warn": "yellow", "error": "red"}


def time_left(job: FineTuningJob) -> str:
    """In minutes and seconds; `-` while nobody knows."""
    seconds = (ours(job).get("progress") or {}).get("seconds_left")
    if job.status != "running" or seconds is None:
        return "-"
    minutes, rest = divmod(round(float(seconds)), 60)
    return f"{minutes}:{rest:02}"
