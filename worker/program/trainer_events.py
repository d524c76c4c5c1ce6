"""Reads a trainer's `events.jsonl` while it grows, and tells clients about it at a bearable rate. No database here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from pydantic import ValidationError

from shared.contract.documents import JobProgress
from shared.contract.events import (
    TRAINER_EVENT,
    Alive,
    CheckpointSaved,
    Failed,
    Finished,
    Message,
    Metrics,
    Started,
    TrainerEvent,
    Validation,
)
from shared.lease.journal import NewEvent
from worker.program import hostile_folder

READ_BYTES: Final = 1024 * 1024  # at most this much a look, so that a flood cannot starve the rest of the loop
EVENTS_BYTES: Final = 256 * 1024 * 1024  # of one attempt: a million steps; more is a flood
LINE_BYTES: Final = 256 * 1024
EVENTS_PER_SECOND: Final = 50
BURST: Final = 500


class EventTail:
    """Whole lines only: a torn last line waits until it is whole; a line that is no event is skipped and counted.

    Where no plain file of the program's own lies, or too large a one, there is nothing to read, and `refused` says why.
    """

    def __init__(self, file: Path, *, line_bytes: int = LINE_BYTES) -> None:
        self._file = file
        self._line_bytes = line_bytes
        self._offset = 0
        self._rest = b""
        self.unreadable = 0
        self.refused: hostile_folder.Refused | None = None

    def read(self) -> Iterator[TrainerEvent]:
        """The events that have come since the last read."""
        for line in self.lines():
            event = self._parse(line)
            if event is not None:
                yield event

    @property
    def offset(self) -> int:
        """How many bytes have been read."""
        return self._offset

    def lines(self) -> list[bytes]:
        """The whole lines that have come since the last read."""
        chunk = self._chunk()
        self._offset += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > self._line_bytes:
            self._rest = b""
            self.unreadable += 1
        return lines

    def _chunk(self) -> bytes:
        try:
            with hostile_folder.opened(self._file.parent, self._file.name) as stream:
                stream.seek(self._offset)
                chunk = stream.read(READ_BYTES)
        except FileNotFoundError:
            return b""
        except hostile_folder.Refused as refused:
            self.refused = refused
            return b""
        if self._offset + len(chunk) > EVENTS_BYTES:
            self.refused = hostile_folder.Refused(f"The program has told more than {EVENTS_BYTES:,} bytes of events.")
            return b""
        return chunk

    def _parse(self, line: bytes) -> TrainerEvent | None:
        try:
            return TRAINER_EVENT.validate_json(line)
        except ValidationError:
            self.unreadable += 1
            return None


@dataclass
class EventsSoFar:
    """What an attempt's events have told so far."""

    clock: Callable[[], float]
    started: Started | None = None
    finished: Finished | None = None
    failed: Failed | None = None
    metrics: Metrics | None = None
    validation: Validation | None = None
    heard: float = 0.0
    save_seconds: float = 0.0  # of the last checkpoint
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=101))

    def __post_init__(self) -> None:
        self.heard = self.clock()

    def hear(self, event: TrainerEvent) -> None:
        self.heard = self.clock()
        match event:
            case Started():
                self.started = event
            case Metrics():
                self.metrics = event
                self.step_seconds.append(event.seconds_per_step)
            case Validation():
                self.validation = event
            case Finished():
                self.finished = event
            case Failed():
                self.failed = event
            case CheckpointSaved():
                self.save_seconds = event.save_seconds or 0.0
            case _:
                pass

    def silence(self) -> float:
        """Seconds since the last event."""
        return self.clock() - self.heard

    def patience(self, *, factor: float, floor_seconds: float) -> float:
        """How long a silence may last. Before the first step a big base model is loaded, which takes its time."""
        if self.started is None or not self.step_seconds:
            return 3 * floor_seconds
        return max(floor_seconds, factor * median(self.step_seconds))

    def until_stopped(self, *, floor_seconds: float) -> float:
        """How long a trainer that is asked to stop may take: it looks between steps, and saves a checkpoint then.

        Two steps: the one that has just begun, and as much again for the checkpoint; of what the last one took twice.
        """
        steps = 2 * median(self.step_seconds) if self.step_seconds else 0.0
        return max(floor_seconds, steps + 2 * self.save_seconds)

    def progress(self) -> JobProgress | None:
        """How far a running job is, for clients and the scheduler; None before the first step."""
        if self.metrics is None:
            return None
        step_seconds = median(self.step_seconds)
        return JobProgress(
            step=self.metrics.step,
            total_steps=self.metrics.total_steps,
            epoch=self.metrics.epoch,
            train_loss=self.metrics.train_loss,
            valid_loss=None if self.validation is None else self.validation.valid_loss,
            valid_scores=None if self.validation is None else self.validation.scores,
            trained_tokens=self.metrics.trained_tokens,
            seconds_per_step=step_seconds,
            seconds_left=round(step_seconds * (self.metrics.total_steps - self.metrics.step), 1),
        )


class Meter:
    """A token bucket over events, with a note of what it held back; the result file still has every step."""

    def __init__(
        self, *, clock: Callable[[], float], per_second: float = EVENTS_PER_SECOND, burst: int = BURST
    ) -> None:
        self._clock, self._per_second, self._burst = clock, per_second, burst
        self._tokens, self._at = float(burst), clock()
        self._dropped = 0

    def admit(self, events: list[NewEvent]) -> list[NewEvent]:
        """Those that may pass, and a marker for those that may not."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_second)
        self._at = now
        passed = events[: int(self._tokens)]
        self._tokens -= len(passed)
        self._dropped += len(events) - len(passed)
        if self._dropped and len(passed) < self._tokens:
            passed.append(
                NewEvent(
                    f"{self._dropped} events left out: they came faster than {self._per_second:g} a second",
                    level="warn",
                )
            )
            self._dropped = 0
        return passed


def client_event(event: TrainerEvent) -> NewEvent | None:
    """A trainer's event as a client reads it; None for those that only the supervisor acts on."""
    match event:
        case Message():
            return NewEvent(event.message, level=event.level)
        case Metrics():
            text = f"Step {event.step}/{event.total_steps}: training loss={event.train_loss:.4g}"
            return NewEvent(text, type="metrics", data=_figures(event))
        case Validation():
            text = f"Step {event.step}: {'full ' if event.full else ''}validation loss={event.valid_loss:.4g}"
            text += "".join(f", {name}={mean:.3g}" for name, mean in (event.scores or {}).items())
            return NewEvent(text, type="metrics", data=_figures(event))
        case Started():
            share = 100 * event.trainable_parameters / max(1, event.all_parameters)
            text = (
                f"Training {event.trainable_parameters:,} of {event.all_parameters:,} parameters ({share:.2f} %) for"
                f" {event.total_steps} steps on {event.train_rows} rows in {event.sequences} sequences"
            )
            return NewEvent(text, data=_figures(event))
        case CheckpointSaved() | Alive() | Finished() | Failed():
            return None


def _figures(event: TrainerEvent) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude={"type", "time"}, exclude_none=True)


def metric_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every metrics and validation event of a finished `events.jsonl`, as plain dicts."""
    try:
        stream = hostile_folder.opened(file.parent, file.name)
    except (FileNotFoundError, hostile_folder.Refused):
        return
    with stream:
        while line := stream.readline(LINE_BYTES):
            if b'"metrics"' in line or b'"validation"' in line:
                try:
                    event = TRAINER_EVENT.validate_json(line)
                except ValidationError:
                    continue  # a torn line of an attempt that was killed within a write
                if isinstance(event, Metrics | Validation):
                    yield event.model_dump(mode="json")
