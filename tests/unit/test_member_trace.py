"""The spans of a further host of an attempt: its phases, its end, and nothing at all where traces are off."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

from shared.lease.values import Lease, Membership
from tests.factories import make_claim
from tests.kept_spans import kept_spans
from worker.attempt.member_trace import MemberTrace

TRACE, REQUEST = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def membership(traceparent: str | None) -> Membership:
    lease = Lease(kind="job", id="ftjob-1", fence=1, worker_id="worker_2", attempt=3)
    return Membership(make_claim(lease, device_ids=("second:0", "second:1"), traceparent=traceparent), 1)


class Stand:
    """A host that is called at 100 s, and whose clock the test sets."""

    def __init__(self, traceparent: str | None = f"00-{TRACE}-{REQUEST}-01") -> None:
        spans, self.kept = kept_spans()
        self.now = 100.0
        self.trace = MemberTrace(spans, membership(traceparent), clock=lambda: self.now)

    def play(self, *phases: Any) -> None:
        for phase in phases:
            self.now += 10
            self.trace.phase(phase)
        self.now += 10

    def named(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.kept.get_finished_spans() if span.name == name)
        return span

    def seconds(self) -> dict[str, tuple[float, float]]:
        return {
            span.name: (span.start_time / 1e9, span.end_time / 1e9)  # type: ignore[operator]  # all have ended
            for span in self.kept.get_finished_spans()
        }


def test_a_host_of_an_attempt_is_a_trace_that_links_to_the_request_and_has_its_phases() -> None:
    stand = Stand()
    with stand.trace:
        stand.play("staging", "ready", "training")
        stand.trace.note_end(exit_code=0, error=None)

    assert stand.seconds() == {
        "attempt.node": (100.0, 140.0),
        "node.staging": (110.0, 120.0),
        "node.ready": (120.0, 130.0),
        "node.training": (130.0, 140.0),
    }
    whole = stand.named("attempt.node")
    assert whole.parent is None
    assert [(format_trace_id(link.context.trace_id), format_span_id(link.context.span_id)) for link in whole.links] == [
        (TRACE, REQUEST)
    ]
    assert whole.attributes is not None
    told = {name.removeprefix("tunepool."): value for name, value in whole.attributes.items()}
    assert told == {
        "job_id": "ftjob-1",
        "attempt": 3,
        "node": 1,
        "project_id": "proj_1",
        "worker_id": "worker_2",
        "devices": 2,
        "exit_code": 0,
    }
    assert whole.status.status_code is StatusCode.UNSET
    own = stand.trace.log_fields
    assert stand.trace.variables == {"TRACEPARENT": f"00-{own['trace_id']}-{own['span_id']}-01"}


@pytest.mark.parametrize(
    ("exit_code", "error", "fault"),
    [(1, None, "ranks_failed"), (4, {"code": "gpu_oom", "message": "Row 3 says: my secret"}, "gpu_oom")],
)
def test_a_host_whose_ranks_fail_says_the_code_and_keeps_the_words(
    exit_code: int, error: dict[str, Any] | None, fault: str
) -> None:
    stand = Stand()
    with stand.trace:
        stand.play("staging")
        stand.trace.note_end(exit_code=exit_code, error=error)

    whole = stand.named("attempt.node")
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, fault)
    assert not any("secret" in span.to_json() for span in stand.kept.get_finished_spans())


def test_a_job_without_a_request_has_no_link_and_a_host_without_traces_says_nothing() -> None:
    stand = Stand(traceparent="words")
    with stand.trace:
        stand.play("staging")
    off = MemberTrace(None, membership(None))
    with off:
        off.phase("training")
        off.note_end(exit_code=1, error=None)

    assert stand.named("attempt.node").links == ()
    assert (off.log_fields, off.variables) == ({}, {})
