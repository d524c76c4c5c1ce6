"""What `/metrics` tells: this process's requests, and the installation as Postgres and the plan know it.

Names, labels and buckets are a promise: rules and dashboards are written for them (docs/observability.md). No label
holds the id of a job, file or key, so that the number of series does not grow with work.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from shared.operating import census
from shared.operating.census import ERROR_BUCKETS, WAIT_BUCKETS, CountedFigure

log = structlog.get_logger()

LOOK_SECONDS: Final = 5.0  # figures are as old as this at most, however many scrape
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PREEMPTED: Final = {"preempted": "queue", "drained": "drain"}  # outcome -> reason
# Key of `devices.readings` -> (metric, what it is)
_READINGS: Final = {
    "utilization": ("tunepool_device_utilization_ratio", "Part of the last moment in which the GPU computed"),
    "watts": ("tunepool_device_power_watts", "Power that the GPU draws"),
    "celsius": ("tunepool_device_temperature_celsius", "Temperature of the GPU"),
}
Blocked = Mapping[tuple[str, str], int]


class Measures(Collector):
    """Made once per process. `look` counts the installation, `blocked` says why jobs wait by (project, reason).

    `spans`: this process's spans by what became of them; None where it makes no traces.
    """

    def __init__(
        self,
        look: Callable[[], Sequence[CountedFigure]],
        blocked: Callable[[], Blocked],
        *,
        processes: int,
        spans: Callable[[], Mapping[str, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._blocked, self._spans, self._clock = look, blocked, spans, clock
        # Who scrapes meets one of several processes by chance, so that their counts are told apart.
        self._process = str(os.getpid()) if processes > 1 else ""
        self._lock = threading.Lock()
        self._seen: tuple[float, list[Metric]] | None = None
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "tunepool_http_request_duration_seconds",
            "Time to the first byte of an answer, by the route's template",
            ("method", "route", "status", "process"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._series: dict[tuple[str, str, int], Histogram] = {}
        self._registry.register(self)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note a request of this process."""
        method = known_method(method)
        series = self._series.get((method, route, status))
        if series is None:  # to look one up by its labels costs twice the note
            series = self._requests.labels(method, route, str(status), self._process)
            self._series[method, route, status] = series
        series.observe(seconds)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the database

    def collect(self) -> Iterator[Metric]:
        """Of the installation. A database that is away leaves its figures out, and says so."""
        yield _gauge("tunepool_build_info", "Version that answers", {("version",): {(version("tunepool-server"),): 1}})
        if self._spans is not None:
            spans: dict[tuple[str, ...], float] = {
                (outcome, self._process): count for outcome, count in self._spans().items()
            }
            yield _counter("tunepool_trace_spans", "Spans of this process", {("outcome", "process"): spans})
        with self._lock:
            if self._seen is None or self._clock() - self._seen[0] >= LOOK_SECONDS:
                self._seen = (self._clock(), self._counted())
            yield from self._seen[1]

    def _counted(self) -> list[Metric]:
        try:
            figures, blocked = self._look(), self._blocked()
        except SQLAlchemyError as error:
            log.warning("metrics.uncounted", error=str(error)[:200])
            return [_gauge("tunepool_up", _UP, {(): {(): 0}})]
        return [_gauge("tunepool_up", _UP, {(): {(): 1}}), *_families(figures, blocked)]


def known_method(method: str) -> str:
    """The method of a request, which may be anything, as one of a few words."""
    return method if method in _METHODS else "other"


_UP: Final = "Whether the database could be counted; without it this process tells of its requests alone"


def _families(figures: Sequence[CountedFigure], blocked: Blocked) -> Iterator[Metric]:
    def of(name: str) -> list[CountedFigure]:
        return [figure for figure in figures if figure.name == name]

    def total(name: str) -> float:
        return sum(figure.value for figure in of(name))

    def by(name: str) -> dict[tuple[str, ...], float]:
        return {(figure.first,): figure.value for figure in of(name)}

    def by_both(name: str) -> dict[tuple[str, ...], float]:
        return {(figure.first, figure.second): figure.value for figure in of(name)}

    attempts = by("attempts")
    yield _gauge("tunepool_jobs", "Jobs that have not ended", {("status", "method"): by_both("jobs")})
    yield _gauge(
        "tunepool_queue_jobs",
        "Waiting jobs by the reason why they wait",
        {("project", "blocked_by"): {key: float(count) for key, count in blocked.items()}},
    )
    yield _gauge("tunepool_queue_oldest_seconds", "Age of the oldest waiting job", {(): {(): total("oldest")}})
    yield _histogram("tunepool_admission_wait_seconds", "From queued to its first start", figures, "wait", WAIT_BUCKETS)
    yield _counter("tunepool_attempts", "Attempts that have ended", {("outcome",): attempts})
    preempted: dict[tuple[str, ...], float] = {
        (reason,): attempts.get((outcome,), 0.0) for outcome, reason in _PREEMPTED.items()
    }
    yield _counter("tunepool_preemptions", "Attempts that gave their device away", {("reason",): preempted})
    yield _counter(
        "tunepool_leases_expired", "Attempts whose worker fell silent", {(): {(): attempts.get(("lost",), 0.0)}}
    )
    yield _counter("tunepool_oom", "Attempts without memory, by what follows", {("rung",): by("oom")})
    yield _gauge("tunepool_jobs_together", "Jobs that share a device now", {(): {(): total("together_now")}})
    yield _counter("tunepool_attempts_together", "Attempts that shared a device", {(): {(): total("together")}})
    yield _counter("tunepool_train_steps", "Optimizer steps", {(): {(): total("steps")}})
    yield _counter("tunepool_train_tokens", "Trained tokens", {(): {(): total("tokens")}})
    seconds = by_both("device_seconds")
    yield _counter("tunepool_device_seconds", "Seconds of leased devices", {("project", "state"): seconds})
    yield _gauge("tunepool_devices", "Devices by what becomes of them", {("state",): by("devices")})
    memory = by_both("memory")
    yield _gauge("tunepool_device_memory_bytes", "Memory of a device, for jobs", {("device", "part"): memory})
    for key, (name, what) in _READINGS.items():
        readings: dict[tuple[str, ...], float] = {
            (reading.first,): reading.value for reading in of("reading") if reading.second == key
        }
        yield _gauge(name, what, {("device",): readings})
    deliveries = {(outcome,): 0.0 for outcome in ("delivered", "failed", "given_up")} | by("deliveries")
    yield _counter("tunepool_webhook_deliveries", "Tries to deliver an event to a webhook", {("outcome",): deliveries})
    yield _histogram(
        "tunepool_estimate_error_ratio",
        "Memory that a job took by the prediction",
        figures,
        "error",
        ERROR_BUCKETS,
    )


# The labels' names, and the value for each set of their values.
Samples = Mapping[tuple[str, ...], Mapping[tuple[str, ...], float]]


def _gauge(name: str, what: str, samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily, name, what, samples)


def _counter(name: str, what: str, samples: Samples) -> Metric:
    return _filled(CounterMetricFamily, name, what, samples)


def _filled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, what: str, samples: Samples
) -> Metric:
    ((labels, values),) = samples.items()
    family = kind(name, what, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, what: str, figures: Sequence[CountedFigure], key: str, bounds: Sequence[float]) -> Metric:
    family = HistogramMetricFamily(name, what)
    sums = sum(figure.value for figure in figures if figure.name == f"{key}_sum")
    family.add_metric([], census.buckets(figures, key, bounds), sums)
    return family
