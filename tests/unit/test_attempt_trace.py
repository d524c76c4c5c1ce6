"""The spans of an attempt, made of what it says and hears; a trainer's events are hostile ground."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id
from sqlalchemy.exc import OperationalError

from shared.contract.events import TRAINER_EVENT
from shared.lease.values import Lease
from tests.factories import make_claim
from tests.kept_spans import kept_spans
from worker.attempt.attempt_trace import MOST_LOOKS, AttemptTrace

TRACE, REQUEST = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CREATED, QUEUED, CLAIMED = 1000.0, 1010.0, 5000.0
SUCCEEDED = {"outcome": "succeeded", "error_code": None, "exit_code": 0, "peak_bytes": 7, "last_step": 10}


@dataclass
class Stand:
    """An attempt's trace with a clock, on a host whose database answers `ending`."""

    traceparent: str | None = f"00-{TRACE}-{REQUEST}-01"
    attempt: int = 1
    ending: Any = field(default_factory=lambda: SUCCEEDED)
    now: float = CLAIMED

    def __post_init__(self) -> None:
        spans, self.kept = kept_spans()
        claim = make_claim(
            Lease(kind="job", id="ftjob-1", fence=1, worker_id="worker_1", attempt=self.attempt),
            traceparent=self.traceparent,
            created_at=datetime.fromtimestamp(CREATED, UTC),
            queued_at=datetime.fromtimestamp(QUEUED, UTC),
        )
        self.trace = AttemptTrace(spans, self, claim, clock=lambda: self.now)  # type: ignore[arg-type]  # of the host, `write` alone

    def write(self, _: Any) -> Any:
        if isinstance(self.ending, Exception):
            raise self.ending
        return self.ending

    def at(self, now: float) -> AttemptTrace:
        self.now = now
        return self.trace

    def hear(self, time: float, **event: Any) -> None:
        self.trace.hear(TRAINER_EVENT.validate_python({"time": time, **event}))

    def start(self) -> None:
        self.at(5001.0).phase("staging")
        self.at(5002.0).phase("training")
        self.now = 6000.0
        figures = dict.fromkeys(
            ("trainable_parameters", "all_parameters", "train_rows", "sequences", "total_steps",
             "train_tokens_per_epoch", "labelled_tokens_per_epoch"), 10,
        )  # fmt: skip
        self.hear(5020.0, type="started", **figures)

    def spans(self) -> list[ReadableSpan]:
        return list(self.kept.get_finished_spans())

    def moments(self) -> dict[str, tuple[float, float]]:
        return {span.name: (span.start_time / 1e9, span.end_time / 1e9) for span in self.spans()}  # type: ignore[operator]  # all have ended

    def named(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.spans() if span.name == name)
        return span


def place(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return format_trace_id(context.trace_id), format_span_id(context.span_id)


def test_an_attempt_is_a_trace_of_its_own_that_links_to_the_request_and_to_the_wait() -> None:
    stand = Stand()
    with stand.trace:
        stand.start()
        stand.hear(5030.0, type="metrics", step=1, total_steps=10, epoch=0.1, train_loss=1, learning_rate=1,
                   trained_tokens=5, seconds_per_step=1)  # fmt: skip
        stand.hear(5035.0, type="alive", doing="validation")
        stand.hear(5039.0, type="alive", doing="validation")
        stand.hear(5040.0, type="validation", step=1, valid_loss=1)
        stand.hear(5045.0, type="checkpoint", step=1, name="step-00000001")
        stand.hear(5050.0, type="finished", steps=10, trained_tokens=50, published_step=10, published_reason="last",
                   peak_memory_bytes=1, train_seconds=1)  # fmt: skip
        stand.at(5051.0).phase("publishing")
        stand.now = 5060.0

    assert stand.moments() == {
        "job.validating": (CREATED, QUEUED),
        "job.queued": (QUEUED, CLAIMED),
        "job.attempt": (CLAIMED, 5060.0),
        "attempt.staging": (5001.0, 5002.0),
        "attempt.training": (5002.0, 5051.0),
        "trainer.load": (5002.0, 5020.0),
        "trainer.train": (5020.0, 5050.0),
        "trainer.validate": (5035.0, 5040.0),
        "trainer.save": (5040.0, 5045.0),
        "attempt.publishing": (5051.0, 5060.0),
    }
    attempt = stand.named("job.attempt")
    assert attempt.parent is None
    assert place(attempt)[0] != TRACE
    links = [(format_trace_id(link.context.trace_id), format_span_id(link.context.span_id)) for link in attempt.links]
    assert links == [(TRACE, REQUEST), place(stand.named("job.queued"))]
    assert {place(stand.named(name))[0] for name in ("job.validating", "job.queued")} == {TRACE}
    others = [span for span in stand.spans() if span.name.startswith(("attempt.", "trainer."))]
    assert {place(span)[0] for span in others} == {place(attempt)[0]}
    assert attempt.attributes is not None
    assert attempt.attributes["tunepool.outcome"] == "succeeded"
    assert attempt.attributes["tunepool.job_id"] == "ftjob-1"
    assert attempt.status.status_code is StatusCode.UNSET
    assert stand.trace.variables["TRACEPARENT"] == f"00-{'-'.join(place(attempt))}-01"
    assert stand.trace.log_fields == dict(zip(("trace_id", "span_id"), place(attempt), strict=True))


def test_a_later_attempt_links_to_the_request_alone_and_a_job_without_one_to_its_wait() -> None:
    second, unasked = Stand(attempt=2), Stand(traceparent="words")
    with second.trace, unasked.trace:
        pass

    assert [format_span_id(link.context.span_id) for link in second.named("job.attempt").links] == [REQUEST]
    (link,) = unasked.named("job.attempt").links
    assert format_span_id(link.context.span_id) == place(unasked.named("job.queued"))[1]
    assert place(unasked.named("job.queued"))[0] == place(unasked.named("job.validating"))[0]


def test_a_trainer_that_lies_about_the_time_stays_within_its_attempt() -> None:
    stand = Stand()
    with stand.trace:
        stand.start()
        stand.hear(1e300, type="checkpoint", step=1, name="step-00000001")
        stand.hear(-1e300, type="validation", step=1, valid_loss=1)
        stand.now = 6001.0

    moments = stand.moments()
    assert moments["trainer.save"] == (5020.0, 6000.0)
    assert moments["trainer.validate"] == (6000.0, 6000.0)
    assert moments["trainer.train"] == (5020.0, 6001.0)


def test_a_flood_of_events_is_no_flood_of_spans() -> None:
    stand = Stand()
    with stand.trace:
        stand.start()
        for step in range(MOST_LOOKS + 5):
            stand.hear(5021.0, type="validation", step=step, valid_loss=1)

    assert sum(span.name == "trainer.validate" for span in stand.spans()) == MOST_LOOKS
    attributes = stand.named("trainer.train").attributes
    assert attributes is not None
    assert attributes["tunepool.spans_left_out"] == 5


def test_a_trainer_that_fails_while_it_loads_says_so_and_its_words_stay_at_home() -> None:
    stand = Stand(ending={"outcome": "failed", "error_code": "data_error"})
    with stand.trace:
        stand.at(5002.0).phase("training")
        stand.now = 5004.0
        stand.hear(5003.0, type="failed", code="data_error", message="Row 3 says: my secret", param="training_file")

    load, attempt = stand.named("trainer.load"), stand.named("job.attempt")
    assert (load.status.status_code, load.status.description) == (StatusCode.ERROR, "data_error")
    assert (attempt.status.status_code, attempt.status.description) == (StatusCode.ERROR, "data_error")
    assert not any("secret" in span.to_json() for span in stand.spans())


@pytest.mark.parametrize("ending", [None, OperationalError("select", {}, ConnectionError())])
def test_an_end_that_nobody_knows_is_an_unknown_one(ending: Any) -> None:
    stand = Stand(ending=ending)
    with stand.trace:
        stand.start()

    attempt = stand.named("job.attempt")
    assert attempt.attributes is not None
    assert attempt.attributes["tunepool.outcome"] == "unknown"
    assert attempt.status.description == "unknown"


def test_without_traces_an_attempt_says_and_hears_nothing() -> None:
    stand = Stand()
    off = AttemptTrace(None, stand, stand.trace._claim)  # type: ignore[arg-type]  # see above
    with off:
        off.phase("training")
        off.hear(TRAINER_EVENT.validate_python({"time": 1.0, "type": "alive", "doing": "step"}))

    assert (off.log_fields, off.variables) == ({}, {})
