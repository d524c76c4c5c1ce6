"""Follows a job by polling, so that it works against any server with OpenAI's fine-tuning API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from openai import APIConnectionError, InternalServerError, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tunepool.printing import printable

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
PATIENCE_SECONDS: Final = 120.0  # a server that restarts is not the end of a watch
EVENTS_PER_PAGE: Final = 100


@dataclass(frozen=True)
class Update:
    """The job now, and the events since the last update, oldest first."""

    job: FineTuningJob
    events: tuple[FineTuningJobEvent, ...]


def ours(job: FineTuningJob) -> dict[str, Any]:
    """The server's extension of a job; empty on servers that have none."""
    found = (job.model_extra or {}).get("tunepool")
    return found if isinstance(found, dict) else {}


def follow(
    client: OpenAI,
    job_id: str,
    *,
    interval_seconds: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Updates until the job has ended.

    Raises openai.APIConnectionError or openai.InternalServerError when the server stays away for `PATIENCE_SECONDS`.
    """
    last_event: str | None = None
    heard = clock()
    while True:
        try:
            job = client.fine_tuning.jobs.retrieve(job_id)
            events = _events_after(client, job_id, last_event)
        except (APIConnectionError, InternalServerError):
            if clock() - heard > PATIENCE_SECONDS:
                raise
            sleep(interval_seconds)
            continue
        heard = clock()
        last_event = events[-1].id if events else last_event
        yield Update(job, events)
        if job.status in TERMINAL:
            return
        sleep(interval_seconds)


def _events_after(client: OpenAI, job_id: str, last_event: str | None) -> tuple[FineTuningJobEvent, ...]:
    # The wire lists the newest first, so reading stops at the one that is known; pages are fetched as needed.
    newest_first = client.fine_tuning.jobs.list_events(job_id, limit=EVENTS_PER_PAGE)
    return tuple(takewhile(lambda event: event.id != last_event, newest_first))[::-1]


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
        self._progress.update(self._task, description=update.job.status, left=_time_left(update.job))


_STYLES: Final = {"warn": "yellow", "error": "red"}


def _time_left(job: FineTuningJob) -> str:
    seconds = (ours(job).get("progress") or {}).get("seconds_left")
    if job.status != "running" or seconds is None:
        return "-"
    minutes, rest = divmod(round(float(seconds)), 60)
    return f"{minutes}:{rest:02}"
