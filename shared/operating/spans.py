"""Spans by OpenTelemetry's SDK, and their way to a collector that may be slow, dead or wrong.

Importing this module imports the SDK: `shared.operating.tracing` does so, in processes that are asked for traces.
Nobody waits for a collector. Spans go to a bounded queue; a thread of its own empties it; what does not fit is counted.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Literal

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from shared.contract.traceparent import TraceParent

log = structlog.get_logger()

Kind = Literal["server", "consumer", "internal"]
Attribute = str | int | float | bool
Outcome = Literal["sent", "failed", "dropped"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("sent", "failed", "dropped")
_KINDS: Final = {"server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER, "internal": SpanKind.INTERNAL}

# How long the end of a process waits for a collector that answers.
CLOSE_SECONDS: Final = 3.0
COMPLAIN_SECONDS: Final = 60.0
_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True)
class OutboxBounds:
    """Of the queue: spans, spans of one message, and seconds until a message that is not full is sent."""

    most: int = 2048
    batch: int = 512
    seconds: float = 5.0

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> OutboxBounds:
        """By the standard's OTEL_BSP_* variables. Raises ValueError."""
        most = int(variables.get("OTEL_BSP_MAX_QUEUE_SIZE", cls.most))
        batch = int(variables.get("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", cls.batch))
        delay = float(variables.get("OTEL_BSP_SCHEDULE_DELAY", cls.seconds * 1000)) / 1000
        if most < 1 or batch < 1 or not 0 < delay < float("inf"):
            raise ValueError("OTEL_BSP_* must be positive numbers")
        return cls(most, min(batch, most), delay)


class Outbox(SpanProcessor):
    """Ended spans on their way.

    Not the SDK's own processor: that one starts a thread in every forked child, and so between the fork and the exec of
    a trainer, where walls are put up that want a process of one thread. And it does not tell how many it dropped.
    """

    def __init__(self, exporter: SpanExporter, bounds: OutboxBounds) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.last_words = ""  # of the exporter, why it failed
        self._exporter, self._bounds = exporter, bounds
        self._waiting: deque[ReadableSpan] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._complained = float("-inf")

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span; never waits for anybody but the thread's short look at the queue."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._change:
            if self._closing or len(self._waiting) >= self._bounds.most:
                self.counts["dropped"] += 1
                return
            self._waiting.append(span)
            if self._thread is None:
                self._thread = threading.Thread(target=self._carry, name="traces", daemon=True)
                self._thread.start()
            if len(self._waiting) >= self._bounds.batch:
                self._change.notify()

    def _carry(self) -> None:
        while batch := self._next():
            result = self._export(batch)
            self.counts["sent" if result is SpanExportResult.SUCCESS else "failed"] += len(batch)
            if result is not SpanExportResult.SUCCESS:
                self._complain()

    def _next(self) -> list[ReadableSpan]:
        """The next spans, once there are many or they have waited; none: it is over."""
        with self._change:
            while not self._closing:
                full = self._change.wait_for(self._is_due, timeout=self._bounds.seconds)
                if full or self._waiting:
                    break
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._bounds.batch))]

    def _is_due(self) -> bool:
        return self._closing or len(self._waiting) >= self._bounds.batch

    def _export(self, batch: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            return self._exporter.export(batch)
        except Exception as error:  # noqa: BLE001  # a collector may answer anything, and this thread must live
            self.last_words = f"{type(error).__name__}: {error}"
            return SpanExportResult.FAILURE

    def _complain(self) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            lost = {name: self.counts[name] for name in OUTCOMES}
            log.warning("traces.lost", reason=self.last_words[:200], **lost)

    def close(self, seconds: float) -> None:
        """Send what waits, for so long at the most; what comes later is dropped."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(seconds)
        self._exporter.shutdown()

    def shutdown(self) -> None:
        self.close(CLOSE_SECONDS)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True  # nobody waits for a collector


class _Words(logging.Handler):
    """Keeps what the SDK logs of its failures for the one line a minute that we write: it may quote a collector."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.last_words = record.getMessage()


class OpenSpan:
    """A span that has begun. Moments are Unix seconds; now where none is named."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def traceparent(self) -> TraceParent:
        context = self._span.get_span_context()
        return TraceParent(
            format_trace_id(context.trace_id), format_span_id(context.span_id), context.trace_flags.sampled
        )

    def child(self, name: str, *, at: float | None = None, **attributes: Attribute) -> OpenSpan:
        """A part of it, begun; `attributes` as for `note`."""
        context = set_span_in_context(self._span, Context())
        part = OpenSpan(self._tracer, self._tracer.start_span(name, context, start_time=_nanoseconds(at)))
        part.note(**attributes)
        return part

    def note(self, **attributes: Attribute) -> None:
        """Attributes of ours, under `tunepool.`: ids, states and numbers, never a text that a tenant wrote."""
        for name, value in attributes.items():
            self._span.set_attribute(f"tunepool.{name}", value)

    def note_standard(self, attributes: Mapping[str, Attribute]) -> None:
        """Attributes by their whole names: the standard's, and ours with what `note` puts before them."""
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def end(self, *, at: float | None = None, fault: str | None = None) -> None:
        """Once. `fault`: a code; the span then counts as failed."""
        if fault is not None:
            self._span.set_status(Status(StatusCode.ERROR, fault))
        self._span.end(_nanoseconds(at))


class Spans:
    """Makes the spans of one process."""

    def __init__(self, provider: TracerProvider, outbox: Outbox, *, hears_others: bool = True) -> None:
        self._tracer = provider.get_tracer("tunepool", version("tunepool-server"))
        self._outbox = outbox
        self.hears_others = hears_others  # whether a request's `traceparent` counts

    def begin(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: TraceParent | None = None,
        links: Sequence[TraceParent] = (),
        at: float | None = None,
    ) -> OpenSpan:
        """A span in the trace of `parent`, or the first of a new trace."""
        context = Context()  # nothing that lies about in this thread
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(_context(parent)), context)
        span = self._tracer.start_span(
            name,
            context,
            kind=_KINDS[kind],
            links=[Link(_context(link)) for link in links],
            start_time=_nanoseconds(at),
        )
        return OpenSpan(self._tracer, span)

    @property
    def counts(self) -> dict[str, int]:
        """Spans so far, by what became of them."""
        return {outcome: self._outbox.counts[outcome] for outcome in OUTCOMES}

    def close(self) -> None:
        """Send what waits, for a moment only."""
        atexit.unregister(self.close)
        self._outbox.close(CLOSE_SECONDS)


def opened(service: str, variables: Mapping[str, str]) -> Spans:
    """By the standard's variables, which the SDK reads too. Raises ValueError where it cannot read them, OSError."""
    logger = logging.getLogger("opentelemetry")
    outbox = Outbox(OTLPSpanExporter(), OutboxBounds.read(variables))
    logger.propagate, logger.handlers = False, [_Words(outbox)]
    provider = TracerProvider(resource=_resource(service, variables), shutdown_on_exit=False)
    provider.add_span_processor(outbox)
    hears_others = "tracecontext" in variables.get("OTEL_PROPAGATORS", "tracecontext").lower()
    spans = Spans(provider, outbox, hears_others=hears_others)
    atexit.register(spans.close)
    return spans


def _resource(service: str, variables: Mapping[str, str]) -> Resource:
    """Who makes these spans; what the variables say of it wins."""
    ours = {"service.version": version("tunepool-server")}
    named = "OTEL_SERVICE_NAME" in variables or "service.name=" in variables.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create(ours if named else {**ours, "service.name": service})


def _context(parent: TraceParent) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)


def _nanoseconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment * _NANOSECONDS)
