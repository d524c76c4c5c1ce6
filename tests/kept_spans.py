"""Spans that are kept for a test as soon as they end."""

from __future__ import annotations

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from shared.operating.spans import OpenSpan, Outbox, OutboxBounds, Spans


class _AtOnce(Outbox):
    """An outbox without a queue and a thread."""

    def take(self, span: OpenSpan) -> None:
        self._export([span])


def kept_spans() -> tuple[Spans, InMemorySpanExporter]:
    """What makes spans, and where each ended one lies."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    return Spans(provider, _AtOnce(kept, OutboxBounds())), kept
