"""The span of a request, and the span that a job remembers as the one that made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from starlette.requests import Request
from starlette.types import Scope

from api.measures import known_method
from shared.contract import traceparent

if TYPE_CHECKING:
    from shared.operating.spans import Spans

# Machines ask for these every few seconds, and nobody looks for a trace of it.
_UNTRACED: Final = frozenset({"/livez", "/readyz", "/metrics"})
_FAULT: Final = 500


class RequestSpan:
    """From the first byte of a request to the last one of its answer. Of strangers' text it holds nothing."""

    def __init__(self, spans: Spans, scope: Scope) -> None:
        self._method = known_method(scope["method"])
        caller = traceparent.of_headers(scope["headers"]) if spans.hears_others else None
        self._span = spans.begin(self._method, kind="server", parent=caller)
        self._span.note_standard({"http.request.method": self._method, "tunepool.request_id": scope["request_id"]})
        self._fault: str | None = None
        self.traceparent = self._span.traceparent

    @property
    def log_fields(self) -> dict[str, str]:
        """What each log line of the request says of it."""
        return {"trace_id": self.traceparent.trace_id, "span_id": self.traceparent.span_id}

    def answered(self, route: str, status: int) -> None:
        """The head of the answer is there. `route`: its template."""
        self._span.rename(f"{self._method} {route}")
        self._span.note_standard({"http.route": route, "http.response.status_code": status})
        self._fault = str(status) if status >= _FAULT else None

    def end(self) -> None:
        self._span.end(fault=self._fault)


def begin(spans: Spans, scope: Scope) -> RequestSpan | None:
    """The span of the request, which its job remembers; None: nobody looks for it."""
    if scope["path"] in _UNTRACED:
        return None
    span = RequestSpan(spans, scope)
    scope["traceparent"] = str(span.traceparent)
    return span


def of_request(request: Request) -> str | None:
    """The `traceparent` that a job of this request remembers: its own span's, else the caller's; None without."""
    own: str | None = request.scope.get("traceparent")
    if own is not None:
        return own
    caller = traceparent.of_headers(request.scope["headers"])
    return None if caller is None else str(caller)
