"""Traces are made when the standard variables ask for them, and whatever is wrong with a collector harms nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, DEFAULT_ON

from api import request_span
from shared.contract import traceparent
from shared.operating import tracing
from shared.operating.spans import Outbox, OutboxBounds, Spans
from shared.settings import child_environment, open_telemetry_variables, trainer_environment
from tests.patience import patience

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
MOST_CALLS = 60  # of Python, for the span of a request
CALLER = traceparent.read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "tunepool"}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "false"}, True),
    ],
)
def test_the_standard_variables_say_whether_traces_are_made(variables: dict[str, str], asked: bool) -> None:
    assert tracing.asked_for(variables) is asked


def test_a_variable_that_is_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pool")

    told = open_telemetry_variables()

    assert told.get("OTEL_SERVICE_NAME") == "pool"
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in told


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http/protobuf"),
    ],
)
def test_a_wish_that_cannot_be_met_is_said_in_words(variables: dict[str, str], words: str) -> None:
    assert words in (tracing.obstacle(variables) or "")
    assert tracing.obstacle({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}) is None


def test_packages_that_are_missing_are_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(tracing, "_PACKAGES", ("opentelemetry.sdk", "a_package.that_is.not_there"))

    with structlog.testing.capture_logs() as lines:
        assert tracing.opened("tunepool-api") is None

    reason = f"a_package.that_is.not_there is not installed: {tracing.REMEDY}"
    assert lines == [{"event": "traces.off", "log_level": "error", "reason": reason}]


@pytest.mark.parametrize("name", ["OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_SCHEDULE_DELAY"])
def test_a_number_that_is_none_is_a_line_and_no_failure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv(name, "plenty")

    with structlog.testing.capture_logs() as lines:
        assert tracing.opened("tunepool-api") is None

    assert [line["log_level"] for line in lines if line["event"] == "traces.off"] == ["error"]


@pytest.mark.slow
def test_who_does_not_ask_for_traces_imports_nothing_of_them() -> None:
    # Redis' client imports the API, and the SDK's metrics where it is there, of itself.
    code = (
        "import sys, api.app, worker.attempt.supervisor;"
        "theirs = ('shared.operating.spans', 'opentelemetry.sdk.trace', 'opentelemetry.exporter');"
        "print([name for name in sys.modules if name.startswith(theirs)])"
    )
    environment = child_environment(**dict.fromkeys(open_telemetry_variables(), ""))

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=patience(120), check=True
    )

    assert done.stdout.strip() == "[]"


def test_a_collectors_password_reaches_no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer secret")

    assert not [name for name in trainer_environment() if name.startswith("OTEL_")]


class Collector(SpanExporter):
    """Takes what it is given once it may, and answers as it was made to."""

    def __init__(self, answer: SpanExportResult | Exception = SpanExportResult.SUCCESS) -> None:
        self.may, self.came = threading.Event(), threading.Event()
        self.answer, self.names = answer, list[str]()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.came.set()
        assert self.may.wait(patience(60))
        self.names += [span.name for span in spans]
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def spans_to(collector: Collector, *, sampler: Any = ALWAYS_ON, **bounds: Any) -> tuple[Spans, Outbox]:
    outbox = Outbox(collector, OutboxBounds(**{"most": 3, "batch": 1, "seconds": 0.01, **bounds}))
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    return Spans(provider, outbox), outbox


def test_a_collector_that_hangs_holds_nobody_up_and_what_does_not_fit_is_counted() -> None:
    collector = Collector()
    spans, outbox = spans_to(collector)

    spans.begin("first").end()
    assert collector.came.wait(patience(60))
    for number in range(10):
        spans.begin(f"span {number}").end()

    assert spans.counts == {"sent": 0, "failed": 0, "dropped": 7}
    collector.may.set()
    outbox.close(patience(60))
    assert collector.names == ["first", "span 0", "span 1", "span 2"]
    assert spans.counts == {"sent": 4, "failed": 0, "dropped": 7}


@pytest.mark.parametrize("answer", [SpanExportResult.FAILURE, ValueError("\x1b[2J rubbish"), ConnectionError()])
def test_a_collector_that_answers_rubbish_costs_its_spans_and_no_more(answer: Any) -> None:
    collector = Collector(answer)
    collector.may.set()
    spans, outbox = spans_to(collector)

    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            spans.begin("span").end()
        outbox.close(patience(60))

    assert spans.counts == {"sent": 0, "failed": 3, "dropped": 0}
    assert lines[0]["event"] == "traces.lost"


def test_a_process_that_ends_does_not_wait_for_a_collector_that_hangs() -> None:
    collector = Collector()
    spans, outbox = spans_to(collector)
    spans.begin("span").end()
    assert collector.came.wait(patience(60))

    outbox.close(0.01)
    spans.begin("late").end()

    assert spans.counts["dropped"] == 1
    collector.may.set()


def test_a_sampler_that_takes_nothing_sends_nothing() -> None:
    collector = Collector()
    collector.may.set()
    spans, outbox = spans_to(collector, sampler=ALWAYS_OFF)

    span = spans.begin("request", parent=CALLER)
    span.child("part", step=1).end()
    span.end()
    outbox.close(patience(60))

    assert collector.names == []
    assert spans.counts == {"sent": 0, "failed": 0, "dropped": 0}
    assert not span.traceparent.sampled
    assert span.traceparent.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_span_without_a_caller_begins_a_trace_of_its_own() -> None:
    collector = Collector()
    collector.may.set()
    spans, outbox = spans_to(collector)

    ours, theirs = spans.begin("ours"), spans.begin("theirs", parent=CALLER)
    part = ours.child("part")
    for span in (part, ours, theirs):
        span.end()
    outbox.close(patience(60))

    assert theirs.traceparent.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert ours.traceparent.trace_id == part.traceparent.trace_id != theirs.traceparent.trace_id
    assert sorted(collector.names) == ["ours", "part", "theirs"]


def test_what_a_request_pays_for_its_span_is_counted() -> None:
    """Calls of Python: a clock tells a tenth from noise only in an hour."""
    collector = Collector()
    collector.may.set()
    spans, outbox = spans_to(collector, sampler=DEFAULT_ON, most=100, batch=100, seconds=60.0)
    calls: list[str] = []

    def heard(frame: FrameType, what: str, _: object) -> None:
        if what == "call":
            calls.append(frame.f_code.co_qualname)

    for measured in (False, True):  # the first span of a process starts the thread that carries them away
        scope: dict[str, Any] = {"method": "GET", "path": "/v1/models", "headers": [], "request_id": "req_1"}
        sys.setprofile(heard if measured else None)
        try:
            span = request_span.begin(spans, scope)
            assert span is not None
            span.answered("/v1/models", 200)
            span.end()
        finally:
            sys.setprofile(None)
    outbox.close(patience(60))

    assert collector.names == ["GET /v1/models"] * 2
    assert len(calls) <= MOST_CALLS, calls
