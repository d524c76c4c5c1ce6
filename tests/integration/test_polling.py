"""Polling a job: cheap while nothing changes, honest about its place, whatever the length of the queue."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from api import plan_cache, plan_process
from api.bell import RingThread
from api.plan_cache import PlanCache
from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.lifecycle import Lane
from tests.factories import make_queued_job
from tests.integration.conftest import Api
from tests.lifecycle.stack import until
from tests.patience import patience

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def queued(api: Api) -> Iterator[str]:
    with session_scope(api.engine) as session:
        job_id = make_queued_job(session, api.caller).id
    yield job_id
    with session_scope(api.engine) as session:
        moves.request_cancel(session, job_id, project_id=api.caller.project_id)


def test_an_unchanged_job_answers_304_and_a_changed_one_does_not(api: Api, queued: str) -> None:
    with api.http() as http:
        first = http.get(f"{JOBS}/{queued}")
        again = http.get(f"{JOBS}/{queued}", headers={"If-None-Match": first.headers["etag"]})
        http.post(f"{JOBS}/{queued}/pause")
        changed = http.get(f"{JOBS}/{queued}", headers={"If-None-Match": first.headers["etag"]})

    assert (first.status_code, again.status_code, changed.status_code) == (200, 304, 200)
    assert again.content == b""
    assert changed.json()["status"] == "paused"


def test_a_queued_job_is_told_its_place_and_when_that_was_true(api: Api, queued: str) -> None:
    deadline = time.monotonic() + patience(10)
    with api.http() as http:
        while (queue := http.get(f"{JOBS}/{queued}").json()["tunepool"]["queue"])["position"] is None:
            assert "Queued a moment ago" in queue["detail"]
            assert time.monotonic() < deadline

    assert (queue["position"], queue["jobs_ahead"], queue["blocked_by"]) == (1, 0, "NO_WORKER")
    assert abs(queue["as_of"] - time.time()) < patience(30)


def test_many_polls_share_one_plan(api: Api, queued: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "PLAN_SECONDS", 3600.0)  # the polls may take long here
    outlook, plans = PlanCache(api.engine, pool_name="default"), 0
    plan, planned, asked = outlook._planner.plan, outlook._planned, threading.Semaphore(0)

    def wait_and_plan() -> plan_process.PlanAnswer:
        """The plan is made once all polls want one."""
        nonlocal plans
        plans += 1
        for _ in range(20):
            assert asked.acquire(timeout=patience(20))
        return plan()

    def want() -> Future[Any]:
        wanted = planned()
        asked.release()
        return wanted

    monkeypatch.setattr(outlook._planner, "plan", wait_and_plan)
    monkeypatch.setattr(outlook, "_planned", want)
    threads = [threading.Thread(target=outlook.of, args=(queued,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(200):
        assert outlook.of(queued).verdict is not None
    outlook.close()

    assert plans == 1


def test_a_job_queued_after_the_plan_is_known_as_soon_as_planning_is_cheap(api: Api, queued: str) -> None:
    outlook = PlanCache(api.engine, pool_name="default")
    assert outlook.of(queued).verdict is not None
    with session_scope(api.engine) as session:
        later = make_queued_job(session, api.caller).id

    until(lambda: outlook.of(later).verdict, seconds=10, what="a plan that knows it")  # a slow machine plans less often

    outlook.close()
    with session_scope(api.engine) as session:
        moves.request_cancel(session, later, project_id=api.caller.project_id)


def test_a_long_plan_is_made_in_a_process_of_its_own_and_says_the_same(
    api: Api, queued: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_process, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(plan_process, "PATIENCE_SECONDS", patience(30))
    planner = plan_process.Planner(api.engine, pool_name="default")

    here, apart = planner.plan(), planner.plan()
    killed = planner._apart
    assert killed is not None
    killed.kill()
    without, again = planner.plan(), planner.plan()
    started = planner._apart
    assert started is not None
    monkeypatch.setattr(plan_process, "PATIENCE_SECONDS", 0.5)
    started.send_signal(signal.SIGSTOP)
    frozen = planner.plan()
    planner.close()

    assert queued in here.verdicts
    assert dict(apart.verdicts) == dict(here.verdicts) == dict(without.verdicts)
    assert dict(again.verdicts) == dict(frozen.verdicts) == dict(here.verdicts)
    assert killed.pid != started.pid
    assert (killed.poll(), started.poll()) == (-signal.SIGKILL, -signal.SIGKILL)


def test_a_burst_of_requests_rings_a_few_times_and_the_last_request_is_not_forgotten() -> None:
    rung: list[tuple[Lane, int]] = []
    asked, all_asked = 0, threading.Event()

    def slow(lane: Lane) -> None:
        rung.append((lane, asked))
        assert all_asked.wait(patience(20))

    bell = RingThread(slow)
    for asked in range(1, 301):  # noqa: B007  # the ring notes how far it had come
        bell.ring("cpu")
    all_asked.set()
    bell.close()

    assert len(rung) <= 2
    assert rung[-1] == ("cpu", 300)
