"""What figures and traces cost a request: `python bench/observability_cost.py [seconds]` (at most; default 240).

One process with the real application and an embedded Postgres. The same poll of a job goes through five doors in turns,
eight requests at a time and in an order drawn anew for each round, so that what else goes on at the machine strikes all
alike: a door that neither counts nor could trace; one that counts for `/metrics`; the one as it is, traces off; one
with traces on; and one that traces a tenth of the requests. Spans become the messages that a collector gets, and no
network carries them; the time of the thread that makes the messages counts. It ends when the 95 % interval of each is
within 0.5 percentage points of its median, or with its time. Prints the processor time of a request, what each door
costs beside the first in the same round (median, and its interval by bootstrap), whether that is under the 3 % that are
allowed, and what it is of a core at 200 polls a second. Then what an idle API pays: a scrape every 30 s.
"""

from __future__ import annotations

import asyncio
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog
from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBasedTraceIdRatio, Sampler
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.app import create_app
from api.request_id import RequestId
from bench.machine import header
from shared.ids import new_id
from shared.operating.spans import Outbox, OutboxBounds, Spans
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from tests.factories import make_key, make_queued_job

REQUESTS = 8
FEWEST_ROUNDS = 60
SURE = 0.5  # percentage points on either side
ALLOWED = 3.0  # per cent
SCRAPE_SECONDS = 30.0
POLLS_A_SECOND = 200
RATIO = 0.1
RESAMPLES = 1000


class Unwatched:
    """The outermost layer as it would be without figures and traces."""

    def __init__(self, app: ASGIApp, *, answered: Any = None) -> None:
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["request_id"] = new_id("req_")
        answer_headers: dict[str, str] = {}
        scope["answer_headers"] = answer_headers
        begun = time.perf_counter()

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in answer_headers.items():
                    headers[name] = value
                seconds = time.perf_counter() - begun
                headers["openai-processing-ms"] = str(round(seconds * 1000))
                if self._answered is not None:
                    route = getattr(scope.get("route"), "path", "none")
                    self._answered(scope["method"], route, message["status"], seconds)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, tagged)


class Nowhere(SpanExporter):
    """Makes each message as the real exporter does, and sends it to nobody."""

    def export(self, spans: Any) -> SpanExportResult:
        assert encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


def spans_by(sampler: Sampler) -> Spans:
    return Spans(TracerProvider(sampler=sampler, shutdown_on_exit=False), Outbox(Nowhere(), OutboxBounds.read({})))


def doors(settings: Settings) -> dict[str, FastAPI]:
    outermost: dict[str, Any] = {
        "neither": lambda answered: Middleware(Unwatched),
        "figures": lambda answered: Middleware(Unwatched, answered=answered),
        "figures, traces off": lambda answered: Middleware(RequestId, answered=answered, spans=None),
        "figures, traces on": lambda answered: Middleware(RequestId, answered=answered, spans=spans_by(ALWAYS_ON)),
        "figures, a tenth": lambda answered: Middleware(
            RequestId, answered=answered, spans=spans_by(ParentBasedTraceIdRatio(RATIO))
        ),
    }
    made = {name: create_app(settings) for name in outermost}
    for name, app in made.items():
        app.user_middleware[0] = outermost[name](app.state.door.measures.answered)  # added last, so outermost
    return made


async def ask(app: FastAPI, path: str, key: str) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200, message

    await app(scope, receive, send)


async def seconds(app: FastAPI, path: str, key: str) -> float:
    """Of the processor, for one request; of all threads of this process."""
    began = time.process_time()
    for _ in range(REQUESTS):
        await ask(app, path, key)
    return (time.process_time() - began) / REQUESTS


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 %: by drawing the rounds again and again."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def ratios_of(spent: dict[str, list[float]]) -> dict[str, list[float]]:
    """What each door costs more than the first, in per cent, round by round."""
    bare = spent["neither"]
    return {
        name: [100 * (own / first - 1) for own, first in zip(values, bare, strict=True)]
        for name, values in spent.items()
        if name != "neither"
    }


def is_sure(ratios: dict[str, list[float]]) -> bool:
    return all(high - low <= 2 * SURE for low, high in map(interval, ratios.values()))


async def polls(made: dict[str, FastAPI], path: str, key: str, *, seconds_at_most: float) -> dict[str, list[float]]:
    """Seconds of the processor for a poll, by door, round by round."""
    spent: dict[str, list[float]] = {name: [] for name in made}
    order, chance, ends = list(made), random.Random(1), time.monotonic() + seconds_at_most
    for app in made.values():
        for _ in range(5):
            await seconds(app, path, key)
    while time.monotonic() < ends:
        chance.shuffle(order)
        for name in order:
            spent[name].append(await seconds(made[name], path, key))
        rounds = len(spent["neither"])
        if rounds >= FEWEST_ROUNDS and rounds % 50 == 0 and is_sure(ratios_of(spent)):
            break
    return spent


async def measure(settings: Settings, *, seconds_at_most: float) -> None:
    engine = make_engine(settings.database_url)
    with session_scope(engine) as session:
        caller, key = make_key(session)
        _, watcher = make_key(session, scopes=("metrics",))
        path = f"/v1/fine_tuning/jobs/{make_queued_job(session, caller).id}"
    made = doors(settings)
    spent = await polls(made, path, key, seconds_at_most=seconds_at_most)
    bare = statistics.median(spent["neither"])
    print(f"{len(spent['neither'])} rounds of {REQUESTS} polls at each door")
    print(f"{'neither':>20}: {bare * 1e6:6.0f} microseconds of the processor a poll")
    for name, ratios in ratios_of(spent).items():
        low, high = interval(ratios)
        cost = statistics.median(ratios)
        verdict = "under" if high < ALLOWED else "over" if low > ALLOWED else "not told from"
        print(
            f"{name:>20}: {statistics.median(spent[name]) * 1e6:6.0f} microseconds, {cost:+.2f} % ({low:+.2f} to"
            f" {high:+.2f}), {verdict} {ALLOWED:.0f} %; {cost * bare * POLLS_A_SECOND:+.2f} % of a core at"
            f" {POLLS_A_SECOND} polls a second"
        )
    scrapes = [await seconds(made["figures, traces off"], "/metrics", watcher) for _ in range(9)]
    scrape = statistics.median(scrapes)
    share = 100 * scrape / SCRAPE_SECONDS
    print(f"{'a scrape':>20}: {scrape * 1e3:6.1f} ms; every {SCRAPE_SECONDS:.0f} s that is {share:.3f} % of a core")
    engine.dispose()


def main() -> None:
    seconds_at_most = float(sys.argv[1]) if len(sys.argv) > 1 else 240.0
    print(f"Python {platform.python_version()}, {header()}")
    with tempfile.TemporaryDirectory() as folder:
        postgres = EmbeddedPostgres(Path(folder) / "postgres")
        postgres.start()
        try:
            url = postgres.url("postgres")
            migrate(url)
            limits = {"key_requests_per_minute": 0, "project_requests_per_minute": 0}
            settings = Settings(home=Path(folder), database_url=url, redis_url="", **limits)
            asyncio.run(measure(settings, seconds_at_most=seconds_at_most))
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
