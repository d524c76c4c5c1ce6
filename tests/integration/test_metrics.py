"""/metrics tells what Postgres knows, to those who may; rules and dashboard ask for nothing that it does not tell."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.app import create_app
from api.measures import Measures
from shared.contract.documents import JobProgress
from shared.jobs import moves
from shared.operating import census
from shared.operating.census import WAIT_BUCKETS
from shared.operating.census import CountedFigure as Figure
from shared.store.db import session_scope
from shared.store.tables import AttemptRow, DeviceRow, JobRow, MeasurementRow, WorkerRow
from tests.factories import claim_on, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.live import served
from tests.patience import patience

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
PANELS = json.loads((ROOT / "deploy/grafana/tunepool.json").read_text())["panels"]
QUERIES = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def samples(page: str) -> Samples:
    read: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            read.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return read


def at(read: Samples, name: str, **labels: str) -> float:
    return read.get(name, {}).get(frozenset(labels.items()), 0.0)


def at_step(step: int) -> JobProgress:
    return JobProgress(
        step=step,
        total_steps=100,
        epoch=0.1,
        train_loss=1.0,
        valid_loss=None,
        trained_tokens=step * 100,
        seconds_per_step=1.0,
        seconds_left=1.0,
    )


def device_of(session: Session, worker: WorkerRow) -> DeviceRow:
    return session.scalars(select(DeviceRow).where(DeviceRow.worker_id == worker.id)).one()


def page(session: Session) -> Samples:
    """What a process that has just started tells."""
    measures = Measures(lambda: census.count(session), dict, processes=1)
    measures.answered("GET", "/v1/models", 200, 0.1)
    return samples(measures.page().decode())


@pytest.mark.parametrize(("scopes", "status"), [(("metrics",), 200), (("admin",), 200), (("*",), 403)])
def test_figures_of_the_installation_are_for_those_who_watch_it(api: Api, scopes: tuple[str, ...], status: int) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=scopes)
    with api.http(key) as client:
        assert client.get("/metrics").status_code == status


def test_a_key_for_figures_opens_nothing_else(api: Api) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=("metrics",))
    with api.http(key) as client:
        statuses = {client.get(path).status_code for path in ("/v1/models", "/v1/files", "/v1/tunepool/pool")}

    assert statuses == {403}


def test_a_live_api_tells_its_requests_by_route_and_nothing_of_single_jobs(api: Api) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=("admin",))
        job = make_queued_job(session, api.caller)
    # A process of its own: one that was scraped a moment ago tells the same again.
    with served(create_app(api.settings)) as url:
        fresh = dataclasses.replace(api, url=url)
        with fresh.http() as client:
            client.get(f"/v1/fine_tuning/jobs/{job.id}")
            client.get(f"/v1/fine_tuning/jobs/{job.id}/nothing")
        with fresh.http(key) as client:
            text = client.get("/metrics").text

    read = samples(text)
    known = {"method": "GET", "route": "/v1/fine_tuning/jobs/{job_id}", "status": "200", "process": ""}
    assert at(read, "tunepool_http_request_duration_seconds_count", **known) >= 1
    unknown = {**known, "route": "none", "status": "404"}
    assert at(read, "tunepool_http_request_duration_seconds_count", **unknown) >= 1
    assert at(read, "tunepool_up") == 1
    waiting = read["tunepool_queue_jobs"]
    assert sum(count for labels, count in waiting.items() if dict(labels)["project"] == api.caller.project_id) >= 1
    assert not re.search(r"ftjob-|file-|key_|\\btp_", text)


def test_what_attempts_did_is_counted_and_only_grows(session: Session) -> None:
    caller, _ = make_key(session)
    before = page(session)
    worker = make_worker(session)
    make_queued_job(session, caller)
    claim = claim_on(session, worker)
    assert claim is not None  # of this job, or of one that another test has left waiting
    job = session.get_one(JobRow, claim.lease.id)
    for step in (10, 25):
        moves.record(session, claim.lease, [], progress=at_step(step))
    running = page(session)
    ended = {"ended_at": func.now(), "outcome": "out_of_memory", "micro_batch_size": 4}
    begun = func.now() - timedelta(seconds=60)
    session.execute(update(AttemptRow).where(AttemptRow.job_id == job.id).values(started_at=begun, **ended))
    after = page(session)

    for name, more in (("tunepool_train_steps_total", 15), ("tunepool_train_tokens_total", 1500)):
        assert at(running, name) - at(before, name) == more
        assert at(after, name) == at(running, name)
    for name, labels, more in (
        ("tunepool_attempts_total", {"outcome": "out_of_memory"}, 1),
        ("tunepool_oom_total", {"rung": "fewer_rows"}, 1),
        ("tunepool_device_seconds_total", {"project": job.project_id, "state": "leased"}, 60),
        ("tunepool_device_seconds_total", {"project": job.project_id, "state": "wasted"}, 60),
        ("tunepool_admission_wait_seconds_count", {}, 1),
    ):
        assert at(after, name, **labels) - at(before, name, **labels) == pytest.approx(more, abs=0.1), name


def test_devices_tell_what_becomes_of_them_and_what_their_gpu_reads(session: Session) -> None:
    before = page(session)
    device = device_of(session, make_worker(session))
    values = {"readings": {"utilization": 0.5, "watts": 301.5, "celsius": 66.0}, "healthy": False}
    session.execute(update(DeviceRow).where(DeviceRow.id == device.id).values(**values))

    read = page(session)

    assert at(read, "tunepool_devices", state="ailing") - at(before, "tunepool_devices", state="ailing") == 1
    assert at(read, "tunepool_device_power_watts", device=device.id) == 301.5
    assert at(read, "tunepool_device_utilization_ratio", device=device.id) == 0.5
    assert at(read, "tunepool_device_temperature_celsius", device=device.id) == 66.0
    assert at(read, "tunepool_device_memory_bytes", device=device.id, part="total") == device.total_bytes


def test_a_database_that_is_away_is_told_and_costs_the_requests_nothing() -> None:
    def away() -> list[Figure]:
        raise OperationalError("select", {}, Exception("away"))

    measures = Measures(away, dict, processes=1)
    measures.answered("GET", "/livez", 200, 0.1)

    read = samples(measures.page().decode())
    assert at(read, "tunepool_up") == 0
    assert sum(read["tunepool_http_request_duration_seconds_count"].values()) == 1


def test_who_scrapes_often_costs_the_database_one_look_in_five_seconds() -> None:
    looks: list[float] = []
    now = 100.0

    def look() -> list[Figure]:
        looks.append(now)
        return []

    measures = Measures(look, dict, processes=1, clock=lambda: now)
    for now in (100.0, 101.0, 104.9, 105.0):  # noqa: B007
        measures.page()

    assert looks == [100.0, 105.0]


def test_a_histogram_counts_up_to_each_bound() -> None:
    waits = [
        Figure("wait", "0", "", 2),
        Figure("wait", "2", "", 3),
        Figure("wait", str(len(WAIT_BUCKETS)), "", 1),
    ]

    cumulated = dict(census.buckets(waits, "wait", WAIT_BUCKETS))

    assert (cumulated["1.0"], cumulated["5.0"], cumulated["15.0"], cumulated["+Inf"]) == (2, 2, 5, 6)


# --- rules and dashboard ----------------------------------------------------------------------------------------------


def selectors(query: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(metric, [(label, value)]) of everything that a query asks for; equalities only."""
    shape = r"(tunepool_[a-z_]+)(?:\{([^}]*)\})?"
    return [(name, re.findall(r'([a-z_]+)="([^"]*)"', labels or "")) for name, labels in re.findall(shape, query)]


@pytest.fixture
def told(session: Session) -> Samples:
    """Everything that an installation tells where everything has happened once."""
    caller, _ = make_key(session)
    worker = make_worker(session)
    session.execute(update(DeviceRow).values(readings={"utilization": 0.5, "watts": 301.5, "celsius": 66.0}))
    job = make_queued_job(session, caller)
    assert claim_on(session, worker) is not None
    measurement: dict[str, Any] = {"base_model": "tiny", "method": "lora", "device_kind": "cpu", "device_name": "CPU"}
    session.add(MeasurementRow(job_id=job.id, **measurement, pass_tokens=1, predicted_bytes=10, measured_bytes=12,
                               trained_tokens=1, train_seconds=1.0))  # fmt: skip
    session.execute(update(AttemptRow).values(ended_at=func.now(), outcome="out_of_memory"))
    make_queued_job(session, caller)
    measures = Measures(lambda: census.count(session), lambda: {(caller.project_id, "HELD"): 1}, processes=1)
    measures.answered("GET", "/v1/models", 200, 0.1)
    return samples(measures.page().decode())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus' promtool is not installed")
def test_the_rules_are_taken_by_prometheus_own_tool() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", str(ROOT / "deploy/prometheus/alerts.yml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=patience(60),
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_rules_and_panels_are_right_and_ask_for_what_there_is(told: Samples) -> None:
    for query in QUERIES:
        promql_parser.parse(query)
        asked = selectors(query)
        assert asked, query
        for name, labels in asked:
            assert name in told, query
            assert {label for label, _ in labels} <= labels_of(told, name), query
        for grouped in re.findall(r"by \(([a-z_, ]+)\)", query):
            assert set(re.split(r", *", grouped)) <= set().union(*(labels_of(told, name) for name, _ in asked)), query


def labels_of(told: Samples, name: str) -> set[str]:
    return {label for key in told[name] for label, _ in key}
