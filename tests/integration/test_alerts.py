"""Each rule of deploy/prometheus/alerts.yml fires when its condition is brought about, and none on a healthy pool."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.measures import Measures
from shared.chores import deliveries
from shared.chores.deliveries import SendResult
from shared.fleet import snapshot
from shared.ids import new_id
from shared.jobs import moves
from shared.lease.values import Claim
from shared.operating import census
from shared.operating.census import CountedFigure as Figure
from shared.store.tables import DeviceRow, JobRow, MeasurementRow, WebhookRow, WorkerRow
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_key, make_queued_job, make_worker
from tests.integration.test_metrics import RULES, at_step, samples
from tests.promql import Scrape, holds

MINUTE = 60.0


class Pool:
    """A pool of two devices on which one job trains, told by `/metrics`' own page every four minutes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.caller: Caller = make_key(session)[0]
        self.workers = [make_worker(session), make_worker(session)]
        self.session.execute(update(DeviceRow).values(readings={"utilization": 0.9, "watts": 300.0, "celsius": 70.0}))
        self.now = 0.0
        self.away = False
        self.measures = Measures(self._look, self._blocked, processes=1, clock=lambda: self.now)
        self.running = self.claim()
        self.step = 0
        self.scrapes: list[Scrape] = []

    def _look(self) -> list[Figure]:
        if self.away:
            raise OperationalError("select", {}, Exception("away"))
        return census.count(self.session)

    def _blocked(self) -> Any:
        return snapshot.make_plan(snapshot.snapshot(self.session, pool_name="default")).verdicts.blocked()

    def claim(self) -> Claim:
        made = make_queued_job(self.session, self.caller)
        for worker in self.workers:
            claim = claim_on(self.session, worker)
            if claim is not None:
                assert claim.lease.id == made.id
                return claim
        raise AssertionError("there is a device for it")

    def train(self) -> None:
        self.step += 10
        moves.record(self.session, self.running.lease, [], progress=at_step(self.step))

    def answer(self, status: int = 200, seconds: float = 0.02, count: int = 100) -> None:
        for _ in range(count):
            self.measures.answered("GET", "/v1/models", status, seconds)

    def scrape(self) -> None:
        self.now += 4 * MINUTE
        self.session.flush()
        self.scrapes.append(Scrape(self.now, samples(self.measures.page().decode())))

    def measured(self, claim: Claim, ratio: float) -> None:
        self.session.add(
            MeasurementRow(
                job_id=claim.lease.id,
                base_model="tiny",
                method="lora",
                device_kind="cpu",
                device_name="CPU",
                pass_tokens=1,
                predicted_bytes=1000,
                measured_bytes=int(1000 * ratio),
                trained_tokens=1,
                train_seconds=1.0,
            )
        )

    def fires(self) -> set[str]:
        return {rule["alert"] for rule in RULES if holds(rule["expr"], self.scrapes)}


@pytest.fixture
def pool(session: Session) -> Pool:
    """It has been watched for a while, and everything has happened once that may happen in a healthy pool."""
    made = Pool(session)
    for number in range(2):
        made.train()
        made.answer()
        short = made.claim()
        made.measured(short, 1.02)
        assert moves.succeed(session, short.lease, manifest={"prefix": "p", "files": []})
        if number == 0:
            made.scrape()
    return made


def test_no_alert_fires_on_a_healthy_pool(pool: Pool) -> None:
    pool.train()
    pool.scrape()

    assert pool.fires() == set()


def _down(pool: Pool) -> None:
    pool.away = True


def _no_steps(pool: Pool) -> None:
    """The job still runs, and its trainer makes no step: from the third scrape back nothing has grown."""
    pool.scrape()
    pool.scrapes = pool.scrapes[-1:]


def _queue_old(pool: Pool) -> None:
    job = make_queued_job(pool.session, pool.caller)
    pool.session.execute(
        update(JobRow).where(JobRow.id == job.id).values(queued_at=func.now() - timedelta(hours=7), held=True)
    )


def _nobody_can(pool: Pool) -> None:
    job = make_queued_job(pool.session, pool.caller)
    pool.session.execute(update(JobRow).where(JobRow.id == job.id).values(bytes_per_device=10**15))


def _leases_expire(pool: Pool) -> None:
    for _ in range(3):
        claim = pool.claim()
        assert moves.fail(pool.session, claim.lease, code="worker_lost", message="x", outcome="lost")


def _device_of(pool: Pool) -> DeviceRow:
    return pool.session.scalars(select(DeviceRow).where(DeviceRow.worker_id == pool.workers[0].id)).one()


def _ailing(pool: Pool) -> None:
    _device_of(pool).healthy = False


def _quarantined(pool: Pool) -> None:
    _device_of(pool).quarantined = True


def _silent(pool: Pool) -> None:
    pool.session.execute(
        update(WorkerRow).where(WorkerRow.id == pool.workers[0].id).values(last_seen=func.now() - timedelta(minutes=5))
    )


def _estimates_drift(pool: Pool) -> None:
    for _ in range(20):
        claim = pool.claim()
        pool.measured(claim, 1.4)
        assert moves.fail(pool.session, claim.lease, code="x", message="x")


def _out_of_memory(pool: Pool) -> None:
    claim = pool.claim()
    assert moves.fail(pool.session, claim.lease, code="out_of_memory", message="x")


def _webhooks_fail(pool: Pool) -> None:
    """Somebody's address answers 500 to one event after the other."""
    row = WebhookRow(
        id=new_id("webhook_"),
        project_id=pool.caller.project_id,
        name="deaf",
        url="https://deaf.example.com",
        event_types=["fine_tuning.job.succeeded"],
        secret="x",
        secret_hint="x",
    )
    pool.session.add(row)
    pool.session.flush()
    for _ in range(6):
        deliveries.test(pool.session, row.id, "fine_tuning.job.succeeded", project_id=pool.caller.project_id)
        due = deliveries.claim(pool.session, worker_id=pool.workers[0].id, lease_seconds=60)
        assert due is not None
        assert deliveries.finish(pool.session, due, SendResult(500, 0.1, "It answered 500."))
        row.rests_until = None
        pool.session.flush()


def _errors(pool: Pool) -> None:
    """They go on: a series that has only been seen once has no rate yet."""
    pool.answer(500, count=10)
    pool.scrape()
    pool.answer(500, count=10)


def _slow(pool: Pool) -> None:
    pool.answer(seconds=4.0, count=30)


def _hot(pool: Pool) -> None:
    _device_of(pool).readings = {"celsius": 95.0}


CONDITIONS: list[tuple[str, Callable[[Pool], None]]] = [
    ("TunepoolDown", _down),
    ("TunepoolNoSteps", _no_steps),
    ("TunepoolQueueOld", _queue_old),
    ("TunepoolNobodyCanRunIt", _nobody_can),
    ("TunepoolLeasesExpire", _leases_expire),
    ("TunepoolDevicesLost", _ailing),
    ("TunepoolDevicesLost", _quarantined),
    ("TunepoolDevicesLost", _silent),
    ("TunepoolEstimatesDrift", _estimates_drift),
    ("TunepoolOutOfMemory", _out_of_memory),
    ("TunepoolWebhooksFail", _webhooks_fail),
    ("TunepoolErrors", _errors),
    ("TunepoolSlow", _slow),
    ("TunepoolGpuHot", _hot),
]


@pytest.mark.parametrize(("alert", "bring_about"), CONDITIONS, ids=[act.__name__[1:] for _, act in CONDITIONS])
def test_an_alert_fires_when_its_condition_is_brought_about_and_no_other_does(
    pool: Pool, alert: str, bring_about: Callable[[Pool], None]
) -> None:
    bring_about(pool)
    if alert != "TunepoolNoSteps":
        pool.train()
    pool.scrape()

    assert pool.fires() == {alert}


def test_an_api_that_does_not_answer_is_an_alert(pool: Pool) -> None:
    pool.scrapes.append(Scrape(pool.now + MINUTE, {}))

    assert "TunepoolDown" in pool.fires()


def test_every_rule_has_its_condition() -> None:
    assert {rule["alert"] for rule in RULES} == {alert for alert, _ in CONDITIONS}
