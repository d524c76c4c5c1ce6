"""Spans as OpenTelemetry knows them, and their way to a collector that may be slow, dead or wrong.

Importing this module imports the SDK: `shared.operating.tracing` does so, in processes that are asked for traces.
Nobody waits for a collector. Spans go to a bounded queue; a thread of its own empties it; what does not fit is counted.

Sampler, ids, resource and exporter are the SDK's. The span that is open is ours: a request pays for it, and the SDK's
own has locks, limits, event lists and metrics of itself that none of our spans needs.
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
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
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
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_LEFT_OUT: Final = TraceFlags(TraceFlags.DEFAULT)
_NO_PARENT: Final = Context()  # nothing that lies about in a thread
_WELL: Final = Status(StatusCode.UNSET)


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


class Outbox:
    """Ended spans on their way.

    Not the SDK's own processor: that one starts a thread in every forked child. This would happen between the fork and
    the exec of a trainer, where walls are put up that need a process with one thread. And it does not tell how many it
    dropped.
    """

    def __init__(self, exporter: SpanExporter, bounds: OutboxBounds) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.last_words = ""  # of the exporter, why it failed
        self._exporter, self._bounds = exporter, bounds
        self._waiting: deque[OpenSpan] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._complained = float("-inf")

    def take(self, span: OpenSpan) -> None:
        """A span that has ended; never waits for anybody but the thread's short look at the queue."""
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

    def _next(self) -> list[OpenSpan]:
        """The next spans, once there are many or they have waited; none: it is over."""
        with self._change:
            while not self._closing:
                full = self._change.wait_for(self._is_due, timeout=self._bounds.seconds)
                if full or self._waiting:
                    break
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._bounds.batch))]

    def _is_due(self) -> bool:
        return self._closing or len(self._waiting) >= self._bounds.batch

    def _export(self, batch: Sequence[OpenSpan]) -> SpanExportResult:
        try:
            return self._exporter.export([span.ended() for span in batch])
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


class _Words(logging.Handler):
    """Keeps the SDK's own log of its failures. We write one line a minute instead: the SDK may quote a collector."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.last_words = record.getMessage()


class OpenSpan:
    """A span that has begun. Moments are Unix seconds; now where none is named."""

    __slots__ = ("_attributes", "_began", "_context", "_end", "_fault", "_kind", "_links", "_name", "_parent", "_spans")

    def __init__(
        self,
        spans: Spans,
        name: str,
        context: SpanContext,
        *,
        kind: SpanKind,
        parent: SpanContext | None,
        links: Sequence[Link],
        at: float | None,
    ) -> None:
        self._spans, self._name, self._context = spans, name, context
        self._kind, self._parent, self._links = kind, parent, links
        self._attributes: dict[str, Attribute] = {}
        self._began = _nanoseconds(at)
        self._end: int | None = None
        self._fault: str | None = None

    @property
    def traceparent(self) -> TraceParent:
        context = self._context
        return TraceParent(
            format_trace_id(context.trace_id), format_span_id(context.span_id), context.trace_flags.sampled
        )

    def child(self, name: str, *, at: float | None = None, **attributes: Attribute) -> OpenSpan:
        """A part of it, begun; `attributes` as for `note`."""
        part = self._spans.open(name, parent=self._context, at=at)
        part.note(**attributes)
        return part

    def note(self, **attributes: Attribute) -> None:
        """Attributes of ours, under `tunepool.`: ids, states and numbers, never a text that a tenant wrote."""
        self.note_standard({f"tunepool.{name}": value for name, value in attributes.items()})

    def note_standard(self, attributes: Mapping[str, Attribute]) -> None:
        """Attributes by their whole names: the standard's, and ours with what `note` puts before them."""
        if self._end is None:
            self._attributes.update(attributes)

    def rename(self, name: str) -> None:
        self._name = name

    def end(self, *, at: float | None = None, fault: str | None = None) -> None:
        """Once. `fault`: a code; the span then counts as failed."""
        if self._end is not None:
            return
        self._end, self._fault = _nanoseconds(at), fault
        if self._context.trace_flags.sampled:
            self._spans.outbox.take(self)

    def ended(self) -> ReadableSpan:
        """As exporters take it."""
        return ReadableSpan(
            self._name,
            context=self._context,
            parent=self._parent,
            resource=self._spans.resource,
            attributes=self._attributes,
            links=self._links,
            kind=self._kind,
            status=_WELL if self._fault is None else Status(StatusCode.ERROR, self._fault),
            start_time=self._began,
            end_time=self._end,
            instrumentation_scope=self._spans.scope,
        )


class Spans:
    """Makes the spans of one process. Of `provider`: sampler, ids and resource, as the standard's variables say."""

    def __init__(self, provider: TracerProvider, outbox: Outbox, *, hears_others: bool = True) -> None:
        self.outbox, self.resource = outbox, provider.resource
        self.scope = InstrumentationScope("tunepool", version("tunepool-server"))
        self._sampler, self._ids = provider.sampler, provider.id_generator
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
        return self.open(
            name,
            kind=_KINDS[kind],
            parent=None if parent is None else _context(parent),
            links=[Link(_context(link)) for link in links],
            at=at,
        )

    def open(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanContext | None = None,
        links: Sequence[Link] = (),
        at: float | None = None,
    ) -> OpenSpan:
        """`begin`, by the SDK's names of a place in a trace. The sampler decides whether it is sent."""
        if parent is None:
            trace_id, around = self._ids.generate_trace_id(), _NO_PARENT
        else:
            trace_id, around = parent.trace_id, set_span_in_context(NonRecordingSpan(parent), _NO_PARENT)
        result = self._sampler.should_sample(around, trace_id, name, kind, None, links)
        context = SpanContext(
            trace_id,
            self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=_SAMPLED if result.decision is Decision.RECORD_AND_SAMPLE else _LEFT_OUT,
        )
        return OpenSpan(self, name, context, kind=kind, parent=parent, links=links, at=at)

    @property
    def counts(self) -> dict[str, int]:
        """Spans so far, by what became of them."""
        return {outcome: self.outbox.counts[outcome] for outcome in OUTCOMES}

    def close(self) -> None:
        """Send what waits, for a moment only."""
        atexit.unregister(self.close)
        self.outbox.close(CLOSE_SECONDS)


def opened(service: str, variables: Mapping[str, str]) -> Spans:
    """By the standard's variables, which the SDK reads too. Raises ValueError where it cannot read them, OSError."""
    logger = logging.getLogger("opentelemetry")
    outbox = Outbox(OTLPSpanExporter(), OutboxBounds.read(variables))
    logger.propagate, logger.handlers = False, [_Words(outbox)]
    provider = TracerProvider(resource=_resource(service, variables), shutdown_on_exit=False)
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
    flags = _SAMPLED if parent.sampled else _LEFT_OUT
    return SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)


def _nanoseconds(moment: float | None) -> int:
    return time.time_ns() if moment is None else int(moment * _NANOSECONDS)
