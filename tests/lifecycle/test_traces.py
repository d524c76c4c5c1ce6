"""From the request to the adapter as a collector of traces sees it: real exporters, real processes, a fake trainer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from api.app import create_app
from shared.store.db import session_scope
from shared.tenants import keys
from tests.fake_collector import FakeCollector, SeenSpan, collecting
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.lifecycle.test_gangs import start_host
from tests.live import served
from tests.patience import paced, patience

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass(frozen=True)
class Site:
    stack: Stack
    collector: FakeCollector
    url: str
    key: str

    def submit(self, behaviour: str, *, trace: str = "c" * 32, **tunepool: Any) -> str:
        """A job of a request that is part of the caller's trace."""
        rows = [
            json.dumps({"text": f"fake: {paced(behaviour)}"}),
            *(json.dumps({"text": f"row {i}"}) for i in range(9)),
        ]
        file = self.stack.upload("\n".join(rows).encode())
        body = {"model": "tiny", "training_file": file, **({"tunepool": tunepool} if tunepool else {})}
        headers = {"authorization": f"Bearer {self.key}", "traceparent": f"00-{trace}-{CALLER}-01"}
        url = f"{self.url}/v1/fine_tuning/jobs"
        return str(httpx2.post(url, json=body, headers=headers, timeout=patience(30)).raise_for_status().json()["id"])

    def attempt(self, job_id: str, number: int) -> SeenSpan:
        wanted = {"tunepool.job_id": job_id, "tunepool.attempt": number}
        (span,) = self.collector.wait(
            lambda spans: [
                span for span in spans if span.name == "job.attempt" and wanted.items() <= span.attributes.items()
            ]
        )
        return span


@contextlib.contextmanager
def watched(servers: Servers, home: Path, *, hosts: int = 1) -> Iterator[Site]:
    """A stack whose processes send their spans to a collector of the test."""
    with collecting() as collector, open_stack(home, servers) as stack:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        with session_scope(stack.engine) as session:
            _, key = keys.create(session, project_id=stack.caller.project_id, name="caller", scopes=("*",))
        if hosts == 1:
            stack.start_worker(TUNEPOOL_LOG_JSON="true", **variables)
        else:
            for number in range(hosts):
                start_host(stack, number, **variables)
        stack.start_janitor()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            app = create_app(stack.settings)
        with served(app) as url:
            stack.wait_for_worker(devices=hosts)
            yield Site(stack, collector, url, key)


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with watched(servers, tmp_path_factory.mktemp("traces")) as made:
        yield made


def test_one_request_leads_by_links_to_the_spans_of_its_attempts_their_trainers_and_the_publication(site: Site) -> None:
    job_id = site.submit("steps=6 save=3 hang=4 once", trace=TRACE)
    until(lambda: site.stack.job(job_id).last_checkpoint, what="a checkpoint to go on from")
    for trainer in site.stack.trainers():
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.kill()
    assert site.stack.wait(job_id).status == "succeeded"
    first, second = site.attempt(job_id, 1), site.attempt(job_id, 2)
    posted = "POST /v1/fine_tuning/jobs"
    (request,) = site.collector.wait(
        lambda seen: [span for span in seen if (span.name, span.trace_id) == (posted, TRACE)]
    )
    spans = list(site.collector.spans)

    def of(attempt: SeenSpan, name: str) -> SeenSpan:
        (span,) = (span for span in spans if (span.trace_id, span.name) == (attempt.trace_id, name))
        return span

    (wait,) = (span for span in spans if span.name == "job.queued" and span.attributes["tunepool.job_id"] == job_id)
    assert (request.service, request.parent_id) == ("tunepool-api", CALLER)
    assert (wait.trace_id, wait.parent_id) == (TRACE, request.span_id)
    assert first.links == [(TRACE, request.span_id), (TRACE, wait.span_id)]
    assert second.links == [(TRACE, request.span_id)]
    assert len({TRACE, first.trace_id, second.trace_id}) == 3
    assert (first.service, first.parent_id) == ("tunepool-worker", "")
    assert (first.attributes["tunepool.outcome"], first.failed, first.fault) == ("crashed", True, "trainer_killed")
    assert (second.attributes["tunepool.outcome"], second.failed) == ("succeeded", False)
    training, publishing = of(second, "attempt.training"), of(second, "attempt.publishing")
    assert training.parent_id == publishing.parent_id == of(second, "attempt.staging").parent_id == second.span_id
    load, train, save = (of(second, f"trainer.{name}") for name in ("load", "train", "save"))
    assert load.parent_id == train.parent_id == training.span_id
    assert (save.parent_id, save.attributes["tunepool.step"]) == (train.span_id, 6)
    assert train.attributes["tunepool.first_step"] == 3
    assert training.start <= load.start <= load.end <= train.start <= save.end <= train.end <= training.end
    assert not [span.name for span in spans if "publishing" in span.name and span.trace_id == first.trace_id]


def test_each_log_line_of_an_attempt_says_its_trace(site: Site) -> None:
    job_id = site.submit("steps=1")
    site.stack.wait(job_id)
    attempt = site.attempt(job_id, 1)

    text, _, _ = (site.stack.home / "worker-home.log").read_text().rpartition("\n")  # the last line may be half written
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    wanted = {"attempt.claimed", "trainer.ended"}
    ours = [line for line in lines if line.get("job_id") == job_id and line["event"] in wanted]
    assert {line["event"] for line in ours} == wanted
    assert {(line["trace_id"], line["span_id"]) for line in ours} == {(attempt.trace_id, attempt.span_id)}


@pytest.mark.parametrize("mood", ["hanging", "rubbish"])
def test_a_collector_that_is_ill_harms_no_training(site: Site, mood: Any) -> None:
    site.collector.mood = mood
    try:
        job = site.stack.wait(site.submit("steps=3"))
    finally:
        site.collector.mood = "well"

    assert job.status == "succeeded"


def test_each_host_of_a_job_on_two_has_its_own_spans_of_the_request(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with watched(servers, tmp_path_factory.mktemp("two"), hosts=2) as site:
        job_id = site.submit("steps=4", trace=TRACE, placement={"strategy": "ddp", "gpus": 1, "nodes": 2})
        job = site.stack.wait(job_id)
        assert job.status == "succeeded", job.error
        leader = site.attempt(job_id, 1)
        wanted = {"tunepool.job_id": job_id, "tunepool.attempt": 1, "tunepool.node": 1}
        (node,) = site.collector.wait(
            lambda seen: [
                span for span in seen if span.name == "attempt.node" and wanted.items() <= span.attributes.items()
            ]
        )
        phases = [span for span in site.collector.spans if span.parent_id == node.span_id]

    assert leader.attributes["tunepool.nodes"] == 2
    assert node.links == leader.links[:1]
    assert node.links[0][0] == TRACE
    assert len({node.trace_id, leader.trace_id, TRACE}) == 3
    assert node.attributes["tunepool.worker_id"] != leader.attributes["tunepool.worker_id"]
    assert (node.attributes["tunepool.exit_code"], node.failed) == (0, False)
    assert {span.name for span in phases} == {"node.staging", "node.ready", "node.training"}
