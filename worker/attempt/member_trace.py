"""The spans of one further host of an attempt, made where it takes part. Off, it does nothing.

They are a trace of their own, as the attempt itself is, linked to the request that made the job. A host does not know
its leader's span: both carry the job, the number of the attempt, and the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared.contract import traceparent
from shared.lease.values import Membership
from shared.store.lifecycle import MemberPhase

if TYPE_CHECKING:
    from shared.operating.spans import OpenSpan, Spans


class MemberTrace:
    """Entered when the host is called and left after everything of it; `phase` and `note_end` in between."""

    def __init__(self, spans: Spans | None, part: Membership, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._phase: OpenSpan | None = None
        self._fault: str | None = None
        self._whole = None if spans is None else self._begun(spans, part)

    def _begun(self, spans: Spans, part: Membership) -> OpenSpan:
        claim = part.claim
        request = traceparent.read(claim.traceparent)
        links = [] if request is None else [request]
        span = spans.begin("attempt.node", kind="consumer", links=links, at=self._clock())
        span.note(
            job_id=claim.lease.id,
            attempt=claim.lease.attempt,
            node=part.node,
            project_id=claim.project_id,
            worker_id=claim.lease.worker_id,
            devices=len(claim.device_ids),
        )
        return span

    @property
    def log_fields(self) -> dict[str, str]:
        """What each log line of this host's part says of it."""
        if self._whole is None:
            return {}
        span = self._whole.traceparent
        return {"trace_id": span.trace_id, "span_id": span.span_id}

    @property
    def variables(self) -> dict[str, str]:
        """Of its ranks' environment."""
        return {} if self._whole is None else {"TRACEPARENT": str(self._whole.traceparent)}

    def phase(self, name: MemberPhase) -> None:
        """The host goes over to its next phase."""
        if self._whole is not None:
            self._leave_phase()
            self._phase = self._whole.child(f"node.{name}", at=self._clock())

    def note_end(self, *, exit_code: int | None, error: dict[str, Any] | None) -> None:
        """What the host says became of its part."""
        if self._whole is not None and exit_code is not None:
            self._whole.note(exit_code=exit_code)
        if error is not None:
            self._fault = str(error["code"])
        elif exit_code:
            self._fault = "ranks_failed"

    def _leave_phase(self) -> None:
        if self._phase is not None:
            self._phase.end(at=self._clock())
            self._phase = None

    def __enter__(self) -> MemberTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._whole is not None:
            self._leave_phase()
            self._whole.end(at=self._clock(), fault=self._fault)
