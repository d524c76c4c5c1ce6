"""The spans of one attempt: what it says and hears, with the moments, made beside it. Off, it does nothing.

An attempt is a trace of its own, linked to the span of the request that made the job: a job may wait for days, and no
span should live so long. The wait becomes a span of the request's trace once it is over. The trainer has no network:
its phases are made of its events. These are hostile ground, so their moments are bounded and their spans counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy.orm import Session

from shared.contract import traceparent
from shared.contract.events import (
    Alive,
    CheckpointSaved,
    Failed,
    Finished,
    Metrics,
    Started,
    TrainerEvent,
    Validation,
)
from shared.jobs import pages
from shared.lease.values import Claim, Lease
from shared.store.lifecycle import AttemptPhase
from worker.host.host import AWAY, Host

if TYPE_CHECKING:
    from shared.contract.traceparent import TraceParent
    from shared.operating.spans import OpenSpan, Spans

log = structlog.get_logger()

# Validations and checkpoints of an attempt that become spans; of a longer one the rest is only counted.
MOST_LOOKS: Final = 200
_FAULTS: Final = frozenset({"failed", "crashed", "out_of_memory", "lost", "unknown"})


class AttemptTrace:
    """Entered with the attempt and left after everything of it; `phase` and `hear` in between. Never raises."""

    def __init__(
        self, spans: Spans | None, host: Host, claim: Claim, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._host, self._claim, self._clock = host, claim, clock
        self._attempt: OpenSpan | None = None
        self._phase: OpenSpan | None = None
        self._trainer: TrainerSpans | None = None
        if spans is not None:
            self._attempt = self._begun(spans)

    def _begun(self, spans: Spans) -> OpenSpan:
        claim = self._claim
        assert claim.spec is not None, "a queued job is resolved"
        request, now = traceparent.read(claim.traceparent), self._clock()
        links = [] if request is None else [request]
        if claim.lease.attempt == 1:  # later ones waited for something else, and the row does not say since when
            links += _wait(spans, claim, parent=request, until=now)
        span = spans.begin("job.attempt", kind="consumer", links=links, at=now)
        span.note(
            job_id=claim.lease.id,
            attempt=claim.lease.attempt,
            project_id=claim.project_id,
            worker_id=claim.lease.worker_id,
            devices=len(claim.device_ids) + sum(len(member.device_ids) for member in claim.members),
            nodes=1 + len(claim.members),
            method=claim.spec.adapter.method,
        )
        return span

    @property
    def log_fields(self) -> dict[str, str]:
        """What each log line of the attempt says of it."""
        if self._attempt is None:
            return {}
        span = self._attempt.traceparent
        return {"trace_id": span.trace_id, "span_id": span.span_id}

    @property
    def variables(self) -> dict[str, str]:
        """Of the trainer's environment: a name that programs know, without any power."""
        return {} if self._attempt is None else {"TRACEPARENT": str(self._attempt.traceparent)}

    def phase(self, name: AttemptPhase) -> None:
        """The attempt goes over to its next phase."""
        if self._attempt is None:
            return
        self._leave_phase()
        self._phase = self._attempt.child(f"attempt.{name}", at=self._clock())
        if name == "training":
            self._trainer = TrainerSpans(self._phase, clock=self._clock)

    def hear(self, event: TrainerEvent) -> None:
        if self._trainer is not None:
            self._trainer.hear(event)

    def _leave_phase(self) -> None:
        if self._trainer is not None:
            self._trainer.end()
            self._trainer = None
        if self._phase is not None:
            self._phase.end(at=self._clock())
            self._phase = None

    def __enter__(self) -> AttemptTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._attempt is None:
            return
        self._leave_phase()
        ending = self._ending()
        outcome = ending["outcome"]
        self._attempt.note(**{name: value for name, value in ending.items() if value is not None})
        self._attempt.end(at=self._clock(), fault=ending["error_code"] or outcome if outcome in _FAULTS else None)

    def _ending(self) -> dict[str, Any]:
        """What the database says became of the attempt; `unknown` where nothing does."""
        unknown = {"outcome": "unknown", "error_code": None}
        try:
            return self._host.write(lambda s: _ending(s, self._claim.lease)) or unknown
        except AWAY as error:
            log.warning("trace.end_unknown", job_id=self._claim.lease.id, error=str(error)[:200])
            return unknown


def _wait(spans: Spans, claim: Claim, *, parent: TraceParent | None, until: float) -> list[TraceParent]:
    """Spans of the check and of the wait that have led to a first attempt, and those to link to."""
    if claim.created_at is None or claim.queued_at is None:
        return []
    queued = min(claim.queued_at.timestamp(), until)
    check = spans.begin("job.validating", parent=parent, at=min(claim.created_at.timestamp(), queued))
    check.note(job_id=claim.lease.id)
    check.end(at=queued)
    wait = spans.begin("job.queued", parent=parent or check.traceparent, at=queued)
    wait.note(job_id=claim.lease.id)
    wait.end(at=until)
    return [wait.traceparent]


def _ending(session: Session, lease: Lease) -> dict[str, Any] | None:
    for row in pages.attempts(session, lease.id):
        if row.number == lease.attempt and row.outcome is not None:
            return {
                "outcome": row.outcome,
                "error_code": (row.error or {}).get("code"),
                "exit_code": row.exit_code,
                "peak_bytes": row.peak_bytes,
                "last_step": row.last_step,
            }
    return None


class TrainerSpans:
    """A trainer's phases by its events: load, train, and within that each look at the validation rows and each save."""

    def __init__(self, training: OpenSpan, *, clock: Callable[[], float]) -> None:
        self._training, self._clock = training, clock
        self._last = clock()  # no event is older than the one before it, nor later than now
        self._began: dict[str, float] = {}  # what it said it is at, and since when
        self._load: OpenSpan | None = training.child("trainer.load", at=self._last)
        self._train: OpenSpan | None = None
        self._looks = 0

    def hear(self, event: TrainerEvent) -> None:
        at = min(max(event.time, self._last), max(self._clock(), self._last))
        match event:
            case Started():
                self._start(event, at)
            case Alive():
                self._began.setdefault(event.doing, at)
            case Validation():
                self._look("trainer.validate", "validation", at, step=event.step)
            case CheckpointSaved():
                self._look("trainer.save", "checkpoint", at, step=event.step)
            case Finished():
                self._end_train(at, steps=event.steps, tokens=event.trained_tokens)
            case Failed():
                self._end_train(at, fault=event.code)
            case Metrics():
                self._began.clear()
            case _:
                pass
        self._last = at

    def _start(self, event: Started, at: float) -> None:
        if self._load is not None:
            self._load.end(at=at)
            self._load = None
            self._train = self._training.child(
                "trainer.train", at=at, first_step=event.first_step, total_steps=event.total_steps
            )

    def _look(self, name: str, doing: str, at: float, *, step: int) -> None:
        """Something that is over: since it said that it is at it, or since its last event."""
        began = self._began.pop(doing, self._last)
        self._looks += 1
        if self._train is not None and self._looks <= MOST_LOOKS:
            self._train.child(name, at=began, step=step).end(at=at)

    def _end_train(self, at: float, *, fault: str | None = None, **figures: int) -> None:
        ended, self._load, self._train = self._train or self._load, None, None
        if ended is not None:
            ended.note(**figures, spans_left_out=max(0, self._looks - MOST_LOOKS))
            ended.end(at=at, fault=fault)

    def end(self) -> None:
        """The trainer has ended, whatever it said."""
        self._end_train(max(self._clock(), self._last))
