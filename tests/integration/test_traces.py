"""Spans of a live API, as a real exporter brings them to a collector on the loopback; and what a job remembers."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.app import create_app
from api.request_id import RequestId
from shared.chores import sweep_rounds
from shared.contract import traceparent
from shared.operating import tracing
from shared.store.db import session_scope
from shared.store.tables import JobRow, TrialRow
from tests.factories import make_file, make_key
from tests.fake_collector import FakeCollector, SeenSpan, collecting
from tests.integration.conftest import Api
from tests.integration.test_schedules import keep_time, let_be_due
from tests.live import served
from tests.patience import patience

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with collecting() as made:
        yield made


@contextmanager
def tracing_api(api: Api, patch: pytest.MonkeyPatch, endpoint: str, **variables: str) -> Iterator[Api]:
    """An API of its own that was started with OpenTelemetry's variables."""
    ours = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20", **variables}
    for name, value in ours.items():
        patch.setenv(name, value)
    with served(create_app(api.settings)) as url:
        yield dataclasses.replace(api, url=url)


def submit(api: Api, *headers: str) -> JobRow:
    """A job of a request with these values of `traceparent`."""
    with session_scope(api.engine) as session:
        file = make_file(session, api.caller).id
    body = {"model": "smollm2-135m-instruct", "training_file": file}
    with api.http() as client:
        answer = client.post("/v1/fine_tuning/jobs", json=body, headers=[("traceparent", value) for value in headers])
    assert answer.status_code == 200, answer.text
    with Session(api.engine) as session:
        return session.get_one(JobRow, answer.json()["id"])


def spans_of(spans: list[SeenSpan], **attributes: Any) -> list[SeenSpan]:
    wanted = {name.replace("__", "."): value for name, value in attributes.items()}
    return [span for span in spans if wanted.items() <= span.attributes.items()]


def test_a_request_is_one_span_with_its_template_and_without_a_strangers_words(
    api: Api, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracing_api(api, monkeypatch, collector.url) as traced, traced.http() as client:
        answer = client.get(
            "/v1/fine_tuning/jobs/ftjob-nobody?secret=words",
            headers={"traceparent": TRACEPARENT, "tracestate": "vendor=words", "baggage": "user=words"},
        )
        client.get("/livez")
        wanted = {"tunepool__request_id": answer.headers["x-request-id"]}
        (span,) = collector.wait(lambda spans: spans_of(spans, **wanted))

    assert (span.name, span.service) == ("GET /v1/fine_tuning/jobs/{job_id}", "tunepool-api")
    assert (span.trace_id, span.parent_id) == (TRACE, CALLER)
    assert span.attributes == {
        "http.request.method": "GET",
        "http.route": "/v1/fine_tuning/jobs/{job_id}",
        "http.response.status_code": 404,
        "tunepool.request_id": answer.headers["x-request-id"],
    }
    assert not span.failed, "the client's fault is none of the server's"
    assert not any("livez" in other.name for other in collector.spans)


def test_the_variables_name_the_service_and_may_leave_the_callers_trace_alone(
    api: Api, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"OTEL_SERVICE_NAME": "tuning", "OTEL_PROPAGATORS": "none"}
    with tracing_api(api, monkeypatch, collector.url, **variables) as traced, traced.http() as client:
        client.get("/v1/models", headers={"traceparent": TRACEPARENT})
        (span,) = collector.wait(lambda spans: spans_of(spans, http__route="/v1/models"))

    assert span.service == "tuning"
    assert span.trace_id != TRACE
    assert span.parent_id == ""


def test_a_job_remembers_the_span_of_its_request(
    api: Api, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracing_api(api, monkeypatch, collector.url) as traced:
        job = submit(traced, TRACEPARENT)
        (span,) = collector.wait(lambda spans: spans_of(spans, http__route="/v1/fine_tuning/jobs"))

    assert job.traceparent == f"00-{TRACE}-{span.span_id}-01"
    assert span.parent_id == CALLER


def test_the_jobs_of_a_sweep_remember_the_span_of_its_request_and_those_of_a_run_by_hand_that_of_the_run(
    api: Api,
) -> None:
    with session_scope(api.engine) as session:
        training, validation = make_file(session, api.caller).id, make_file(session, api.caller).id
    job = {"model": "smollm2-135m-instruct", "training_file": training, "validation_file": validation}
    swept = {"job": job, "parameters": {"tunepool.training.learning_rate": [1e-4, 2e-4]}, "strategy": {"type": "grid"}}
    scheduled = {"name": "nightly", "cron": "30 2 * * *", "time_zone": "UTC", "job": job}
    asked = {"traceparent": TRACEPARENT}
    with api.http() as client:
        sweep = client.post("/v1/tunepool/sweeps", json={**swept, "max_parallel": 2}, headers=asked).json()["id"]
        client.post("/v1/tunepool/schedules", json=scheduled).raise_for_status()
        run = client.post("/v1/tunepool/schedules/nightly/run", json={"force": True}, headers=asked).json()
    with session_scope(api.engine) as session:
        sweep_rounds.advance(session, sweep, settings=api.settings)
    with Session(api.engine) as session:
        trials = select(TrialRow.job_id).where(TrialRow.sweep_id == sweep)
        remembered = session.scalars(select(JobRow.traceparent).where(JobRow.id.in_(trials))).all()
        by_hand = session.get_one(JobRow, run["job_id"]).traceparent

    assert remembered == [TRACEPARENT, TRACEPARENT]
    assert by_hand == TRACEPARENT


def test_a_job_that_a_clock_starts_remembers_no_request(api: Api) -> None:
    with session_scope(api.engine) as session:
        job = {"model": "smollm2-135m-instruct", "training_file": make_file(session, api.caller).id}
    scheduled = {"name": "by-clock", "cron": "0 3 * * *", "time_zone": "UTC", "job": job, "skip_unchanged": False}
    with api.http() as client:
        schedule = client.post("/v1/tunepool/schedules", json=scheduled, headers={"traceparent": TRACEPARENT}).json()
        let_be_due(api, schedule)
        keep_time(api)
        (run, *_) = client.get("/v1/tunepool/schedules/by-clock").json()["last_runs"]
    with Session(api.engine) as session:
        remembered = session.get_one(JobRow, run["job_id"]).traceparent

    assert (run["cause"], remembered) == ("cron", None)


def test_an_api_without_traces_remembers_its_callers_span(api: Api) -> None:
    assert submit(api, TRACEPARENT).traceparent == TRACEPARENT
    assert submit(api).traceparent is None


@pytest.mark.parametrize(
    "headers", [["words"], [TRACEPARENT, TRACEPARENT], [TRACEPARENT.upper()], [f"00-{'0' * 32}-{CALLER}-01"]]
)
def test_a_traceparent_that_is_none_costs_no_job(api: Api, headers: list[str]) -> None:
    assert submit(api, *headers).traceparent is None


def test_what_the_sampler_leaves_out_is_remembered_as_left_out(
    api: Api, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracing_api(api, monkeypatch, collector.url, OTEL_TRACES_SAMPLER="always_off") as traced:
        job = submit(traced, TRACEPARENT)

    span = traceparent.read(job.traceparent)
    assert span is not None
    assert (span.trace_id, span.sampled) == (TRACE, False)
    assert collector.spans == []


def lost(client: Any) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "tunepool_trace_spans_total" and sample.labels["outcome"] in ("failed", "dropped")
    )


@pytest.mark.parametrize("mood", ["dead", "hanging", "rubbish"])
def test_a_collector_that_is_ill_harms_no_request_and_its_losses_are_counted(
    api: Api, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch, mood: Any
) -> None:
    endpoint = collector.url
    if mood == "dead":
        with socket.create_server(("127.0.0.1", 0)) as gone:
            endpoint = f"http://127.0.0.1:{gone.getsockname()[1]}"
    else:
        collector.mood = mood
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=("metrics",))
    variables = {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.5", "OTEL_BSP_MAX_QUEUE_SIZE": "1"}
    with (
        tracing_api(api, monkeypatch, endpoint, **variables) as traced,
        traced.http() as client,
        traced.http(key) as watcher,
    ):
        deadline = time.monotonic() + patience(30)
        while not (counted := lost(watcher)) and time.monotonic() < deadline:
            assert client.get("/v1/models").status_code == 200

    assert counted > 0


def test_each_log_line_of_a_request_says_its_trace(monkeypatch: pytest.MonkeyPatch, collector: FakeCollector) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    spans = tracing.opened(tracing.API)
    assert spans is not None
    seen: list[dict[str, Any]] = []

    async def handler(*_: Any) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    app = RequestId(handler, answered=lambda *_: None, spans=spans)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"traceparent", TRACEPARENT.encode())]}
    asyncio.run(app(scope, None, None))  # type: ignore[arg-type]  # nothing is received and sent

    assert seen[0]["trace_id"] == TRACE
    assert scope["traceparent"] == f"00-{TRACE}-{seen[0]['span_id']}-01"
    assert "trace_id" not in structlog.contextvars.get_contextvars()
    spans.close()
