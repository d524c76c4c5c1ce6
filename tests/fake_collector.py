"""A collector of traces on the loopback: takes OTLP over HTTP in protobuf, as real ones do, and may fall ill."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.patience import patience


@dataclass(frozen=True)
class SeenSpan:
    """What the wire says of a span; ids in hexadecimal digits, moments in Unix seconds."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    links: list[tuple[str, str]]
    attributes: dict[str, Any]
    start: float
    end: float
    failed: bool
    fault: str


@dataclass
class FakeCollector:
    url: str
    mood: Literal["well", "hanging", "rubbish"] = "well"
    spans: list[SeenSpan] = field(default_factory=list)
    asked: int = 0
    change: threading.Condition = field(default_factory=threading.Condition)
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self, wanted: Callable[[list[SeenSpan]], Any], *, seconds: float = 30.0) -> Any:
        """The first true answer about the spans that have come."""
        with self.change:
            answer = self.change.wait_for(lambda: wanted(self.spans), timeout=patience(seconds))
            assert answer, [(span.service, span.name, span.attributes) for span in self.spans]
            return answer

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self.change:
            for resource in request.resource_spans:
                said = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [_seen(span, str(said.get("service.name"))) for span in scope.spans]
            self.change.notify_all()


def _seen(span: Any, service: str) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        attributes=_values(span.attributes),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        failed=span.status.code == 2,
        fault=span.status.message,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, str(entry.value.WhichOneof("value"))) for entry in attributes}


@contextmanager
def collecting() -> Iterator[FakeCollector]:
    """A collector that lives as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with collector.change:
                collector.asked += 1
                collector.change.notify_all()
            if collector.mood == "hanging":
                collector.over.wait()
                return
            if collector.mood == "rubbish":
                self.wfile.write(b"\x1b[2J HTTP/9.9 maybe\r\n\r\n\0\xff")
                return
            assert self.path == "/v1/traces"
            collector.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None: ...  # who asked may be gone

    server = Server(("127.0.0.1", 0), Handler)
    collector = FakeCollector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, name="collector")
    thread.start()
    try:
        yield collector
    finally:
        collector.over.set()
        server.shutdown()
        thread.join(patience(10))
        server.server_close()
