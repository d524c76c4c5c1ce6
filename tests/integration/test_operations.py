"""A pool operated live, through the API: every order works, is bounded by the key, and is audited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update

from shared.fleet import snapshot
from shared.jobs import moves
from shared.lease.values import Claim
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, AttemptRow, DeviceRow, EventRow, JobRow, ProjectRow, WorkerRow
from tests.factories import (
    claim_on,
    make_caller,
    make_file,
    make_job,
    make_key,
    make_queued_job,
    make_worker,
    verdict_of,
)
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.patience import patience

MANIFEST = {"prefix": "p", "files": []}


@pytest.fixture(scope="module")
def operator(api: Api) -> Iterator[httpx2.Client]:
    """A client whose key may run the pool; its project is another one than `api.caller`'s."""
    with session_scope(api.engine) as session:
        secret = make_key(session, scopes=("*", "admin"))[1]
    with api.http(secret) as client:
        yield client


@pytest.fixture
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


@pytest.fixture(autouse=True)
def clean(api: Api) -> Iterator[None]:
    """No job waits and no device is busy when a test begins."""
    yield
    with session_scope(api.engine) as session:
        session.execute(update(JobRow).values(lease_until=None).where(JobRow.status == "validating_files"))
        waiting = session.scalars(select(JobRow.id).where(JobRow.status.in_(["queued", "validating_files", "paused"])))
        moves.cancel_all_waiting(session, waiting.all(), reason="test over")
        session.execute(update(DeviceRow).values(leased_by=None, fence=None))
        session.execute(update(WorkerRow).values(last_seen=func.now() - timedelta(days=2)))


def queued(api: Api, **values: object) -> str:
    with session_scope(api.engine) as session:
        return make_queued_job(session, api.caller, **values).id


def worker_of(api: Api, **values: object) -> str:
    with session_scope(api.engine) as session:
        return make_worker(session, **values).id


def pull(api: Api, worker_id: str) -> Claim | None:
    with session_scope(api.engine) as session:
        return claim_on(session, session.get_one(WorkerRow, worker_id))


def queue_of(http: httpx2.Client, job_id: str) -> dict[str, object]:
    """What the first plan says that is surely made after this moment: the door keeps one until the next is there."""
    after = int(time.time()) + 1  # moments of plans are whole seconds
    deadline = time.monotonic() + patience(30)
    while True:
        queue: dict[str, Any] = http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["tunepool"]["queue"]
        if queue["as_of"] >= after:
            return queue
        assert time.monotonic() < deadline, queue
        time.sleep(0.1)


def last_act(operator: httpx2.Client, target: str) -> dict[str, object]:
    found: dict[str, object] = operator.get("/v1/tunepool/audit", params={"target": target}).json()["data"][0]
    return found


def test_a_held_job_is_not_started_until_it_is_released(api: Api, http: httpx2.Client, operator: httpx2.Client) -> None:
    job_id, worker_id = queued(api), worker_of(api)

    assert http.post(f"/v1/tunepool/jobs/{job_id}/hold").status_code == 200
    held = pull(api, worker_id)
    waits = queue_of(http, job_id)
    http.post(f"/v1/tunepool/jobs/{job_id}/release")
    claim = pull(api, worker_id)

    assert held is None
    assert waits["blocked_by"] == "HELD"
    assert claim is not None
    assert last_act(operator, job_id)["action"] == "job.release"
    assert last_act(operator, job_id)["before"] == {"held": True}


@pytest.mark.parametrize("what", ["pool", "project"])
def test_a_held_pool_or_project_starts_nothing(
    api: Api, http: httpx2.Client, operator: httpx2.Client, what: str
) -> None:
    place = "pool" if what == "pool" else f"projects/{api.caller.project_id}"
    job_id, worker_id = queued(api), worker_of(api)

    assert operator.post(f"/v1/tunepool/{place}/hold").json()["held"] is True
    held = pull(api, worker_id)
    waits = queue_of(http, job_id)
    assert operator.post(f"/v1/tunepool/{place}/release").json()["held"] is False

    assert held is None
    assert waits["blocked_by"] == "HELD"
    assert pull(api, worker_id) is not None


def test_a_drained_worker_and_a_quarantined_device_take_no_job(
    api: Api, http: httpx2.Client, operator: httpx2.Client
) -> None:
    job_id, worker_id = queued(api), worker_of(api)
    device = f"{worker_id}:0"

    assert operator.post(f"/v1/tunepool/workers/{worker_id}/drain").json()["draining"] is True
    drained = pull(api, worker_id)
    operator.post(f"/v1/tunepool/workers/{worker_id}/undrain")
    operator.post(f"/v1/tunepool/devices/{device}/quarantine", json={"reason": "fan"})
    quarantined = pull(api, worker_id)
    waits = queue_of(http, job_id)
    assert operator.post(f"/v1/tunepool/devices/{device}/release").json()["quarantined"] is False

    assert (drained, quarantined) == (None, None)
    assert waits["blocked_by"] == "DEVICE_QUARANTINED"
    assert pull(api, worker_id) is not None
    acts = operator.get("/v1/tunepool/audit", params={"target": device}).json()["data"]
    assert [act["action"] for act in acts] == ["device.release", "device.quarantine"]
    assert acts[1]["after"] == {"quarantined": True, "reason": "fan"}


def test_what_is_not_there_is_a_404(operator: httpx2.Client, api: Api) -> None:
    for route in (
        "POST workers/x/drain",
        "POST devices/x/release",
        "POST jobs/ftjob-x/hold",
        "POST projects/x/hold",
        "GET projects/x",
        "DELETE keys/x",
    ):
        method, path = route.split()
        refused(api, operator.request(method, f"/v1/tunepool/{path}"), status=404)


def test_priority_is_changed_within_the_bounds_of_the_key_and_beyond_by_an_administrator(
    api: Api, http: httpx2.Client, operator: httpx2.Client
) -> None:
    first, second = queued(api), queued(api)
    assert http.post(f"/v1/tunepool/jobs/{second}/priority", json={"priority": 7}).status_code == 200
    with session_scope(api.engine) as session:
        limits = {"max_tier": "normal", "max_priority": 10}
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(**limits))
    try:
        tier = refused(api, http.post(f"/v1/tunepool/jobs/{first}/priority", json={"tier": "interactive"}), status=403)
        high = refused(api, http.post(f"/v1/tunepool/jobs/{first}/priority", json={"priority": 11}), status=403)
        with session_scope(api.engine) as session:
            body = {"model": "smollm2-135m-instruct", "training_file": make_file(session, api.caller).id}
        asked = {**body, "tunepool": {"queue": {"tier": "interactive"}}}
        submitted = refused(api, http.post("/v1/fine_tuning/jobs", json=asked), status=403)
    finally:
        with session_scope(api.engine) as session:
            free = {"max_tier": "interactive", "max_priority": 100}
            session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(**free))
    assert operator.post(f"/v1/tunepool/jobs/{first}/priority", json={"tier": "interactive"}).status_code == 200

    assert (tier["code"], high["code"], submitted["code"]) == (
        "tier_not_allowed",
        "priority_not_allowed",
        "tier_not_allowed",
    )
    assert submitted["param"] == "tunepool.queue.tier"
    assert queue_of(http, first)["position"] == 1
    assert last_act(operator, second)["after"] == {"tier": "normal", "priority": 7}


def test_another_projects_job_is_not_there_for_a_key_without_admin(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        theirs = make_job(session, make_caller(session))
        job_id, project_id = theirs.id, theirs.project_id

    refused(api, http.post(f"/v1/tunepool/jobs/{job_id}/hold"), status=404)
    refused(api, http.post(f"/v1/tunepool/jobs/{job_id}/priority", json={"priority": 1}), status=404)
    refused(api, http.post("/v1/tunepool/jobs/cancel", json={"all": True, "project_id": project_id}), status=403)
    assert http.post("/v1/tunepool/jobs/cancel", json={"job_ids": [job_id]}).json()["cancelled"] == []


def test_a_thousand_waiting_jobs_are_cancelled_in_one_order_each_with_its_event(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        file = make_file(session, api.caller)
        ids = {make_job(session, api.caller, file=file).id for _ in range(1000)}

    done = http.post("/v1/tunepool/jobs/cancel", json={"all": True}).json()

    assert set(done["cancelled"]) == ids
    with session_scope(api.engine) as session:
        left = session.scalar(select(func.count()).where(JobRow.id.in_(ids), JobRow.status != "cancelled"))
        told = session.scalar(
            select(func.count()).where(EventRow.job_id.in_(ids), EventRow.message.startswith("Job cancelled"))
        )
    assert (left, told) == (0, 1000)


def test_many_are_cancelled_by_group_label_or_id_and_running_ones_only_when_named(
    api: Api, http: httpx2.Client
) -> None:
    running = queued(api)
    assert pull(api, worker_of(api)) is not None
    one = queued(api, tunepool={"queue": {"group": "main"}})
    two = queued(api, metadata={"team": "search"})
    three = queued(api)

    def cancel(**body: object) -> dict[str, list[str]]:
        found: dict[str, list[str]] = http.post("/v1/tunepool/jobs/cancel", json=body).json()
        return found

    assert cancel(group="main")["cancelled"] == [one]
    assert cancel(metadata={"team": "search"})["cancelled"] == [two]
    assert cancel(job_ids=[three, running]) | {"object": ""} == {
        "object": "",
        "cancelled": [three],
        "asked_to_stop": [],
    }
    assert running in cancel(all=True, statuses=["running"])["asked_to_stop"]
    refused(api, http.post("/v1/tunepool/jobs/cancel", json={}))
    refused(api, http.post("/v1/tunepool/jobs/cancel", json={"all": True, "group": "main"}))


def test_projects_are_made_and_edited_and_the_next_plan_follows(api: Api, operator: httpx2.Client) -> None:
    made = operator.post("/v1/tunepool/projects", json={"name": "vision", "weight": 2, "budget_gpu_hours": 10}).json()
    again = refused(api, operator.post("/v1/tunepool/projects", json={"name": "vision"}), status=409)
    url = f"/v1/tunepool/projects/{made['id']}"

    edited = operator.patch(url, json={"weight": 3.5, "max_running": 4, "budget_gpu_hours": None}).json()
    crossed = refused(api, operator.patch(url, json={"budget_gpu_hours": 1, "budget_soft_gpu_hours": 2}))
    unknown = refused(api, operator.patch(url, json={"wieght": 1}))

    assert again["code"] == "project_exists"
    assert (edited["weight"], edited["max_running"], edited["budget_gpu_hours"]) == (3.5, 4, None)
    assert (crossed["param"], unknown["code"]) == ("budget_soft_gpu_hours", "unknown_parameter")
    with session_scope(api.engine) as session:
        view = snapshot.snapshot(session, pool_name="default")
    share = next(share for share in view.shares if share.project == made["id"])
    assert (share.weight, share.max_running, share.budget_left_seconds) == (3.5, 4, None)
    act = last_act(operator, made["id"])
    assert act["before"]["weight"] == 2
    assert act["after"]["weight"] == 3.5
    assert made["id"] in [one["id"] for one in operator.get("/v1/tunepool/projects").json()["data"]]


def test_a_key_is_made_shown_once_edited_and_revoked(api: Api, operator: httpx2.Client) -> None:
    wanted = {"project_id": api.caller.project_id, "name": "ci", "scopes": ["jobs:read"], "max_running": 2}
    made = operator.post("/v1/tunepool/keys", json=wanted).json()
    url = f"/v1/tunepool/keys/{made['id']}"
    with api.http(made["api_key"]) as ci:
        assert ci.get("/v1/fine_tuning/jobs").status_code == 200
        refused(api, ci.get("/v1/models"), status=403)
        assert (
            operator.patch(url, json={"scopes": ["models:read"], "max_tier": "normal"}).json()["max_tier"] == "normal"
        )
        assert ci.get("/v1/models").status_code == 200
        assert operator.delete(url).json()["revoked_at"] is not None
        refused(api, ci.get("/v1/models"), status=401)

    everything = operator.get("/v1/tunepool/keys").text + operator.get("/v1/tunepool/audit").text
    assert made["api_key"] not in everything
    assert refused(api, operator.patch(url, json={"scopes": ["root"]}))["param"] == "scopes"
    assert refused(api, operator.patch(url, json={"expires_at": 1}))["param"] == "expires_at"
    assert refused(api, operator.post("/v1/tunepool/keys", json=wanted | {"expires_at": 1}))["param"] == "expires_at"
    assert [
        act["action"] for act in operator.get("/v1/tunepool/audit", params={"target": made["id"]}).json()["data"]
    ] == [
        "key.revoke",
        "key.edit",
        "key.create",
    ]


def test_a_key_over_its_cap_waits_and_one_with_a_full_queue_is_refused(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
        key = session.get_one(ApiKeyRow, caller.key_id)
        key.max_running, key.max_queued = 1, 1
        make_queued_job(session, caller)
        worker = make_worker(session, devices=2)
        assert claim_on(session, worker) is not None
        waiting = make_queued_job(session, caller)
        verdict = verdict_of(session, waiting.id)
        body = {"model": "smollm2-135m-instruct", "training_file": make_file(session, caller).id}

    assert verdict is not None
    assert verdict.blocked_by == "QUOTA_KEY"
    with api.http(secret) as limited:
        full = refused(api, limited.post("/v1/fine_tuning/jobs", json=body), status=429)
    assert full["code"] == "queue_full"
    assert "API key" in full["message"]


def test_a_month_over_its_hard_budget_waits_and_over_its_soft_one_is_warned(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session, budget_device_seconds=7200.0, budget_soft_device_seconds=3600.0)
        worker = make_worker(session)
        first = make_queued_job(session, caller)
        first.expected_seconds = 60.0
        claim = claim_on(session, worker)
        assert claim is not None
        assert moves.succeed(session, claim.lease, manifest=MANIFEST)
        # Its time lies ahead: two hours back it would be another month's, where this month has only begun.
        ahead = {"started_at": func.now(), "ended_at": func.now() + timedelta(seconds=7190)}
        session.execute(update(AttemptRow).where(AttemptRow.job_id == first.id).values(ahead))
        body = {"model": "smollm2-135m-instruct", "training_file": make_file(session, caller).id}

    with api.http(secret) as their:
        answer = their.post("/v1/fine_tuning/jobs", json=body)
        events = their.get(f"/v1/fine_tuning/jobs/{answer.json()['id']}/events").json()["data"]
        mine = their.get("/v1/tunepool/pool").json()["projects"]
    with session_scope(api.engine) as session:
        session.execute(update(JobRow).where(JobRow.id == answer.json()["id"]).values(status="cancelled"))
        second = make_queued_job(session, caller)
        verdict = verdict_of(session, second.id)

    assert "soft limit of 1.0" in answer.headers["tunepool-warning"]
    assert any(event["level"] == "warn" and "soft limit" in event["message"] for event in events)
    assert [round(one["usage"]["month_gpu_hours"], 1) for one in mine] == [2.0]
    assert verdict is not None
    assert verdict.blocked_by == "BUDGET"
    assert "left of its budget" in verdict.detail


def test_the_first_forecast_is_kept_and_its_drift_is_shown(api: Api, http: httpx2.Client) -> None:
    worker_id = worker_of(api)
    queued(api, tunepool={"queue": {"max_runtime_seconds": 7200}})
    assert pull(api, worker_id) is not None
    waiting = queued(api)
    assert pull(api, worker_id) is None  # its plan notes the forecast
    with session_scope(api.engine) as session:
        earlier = timedelta(hours=1)
        row = session.get_one(JobRow, waiting)
        assert row.first_eta_low is not None and row.first_eta_high is not None  # noqa: PT018 -- one forecast
        row.first_eta_low -= earlier
        row.first_eta_high -= earlier
        first_high = row.first_eta_high

    told = queue_of(http, waiting)

    assert told["first_eta_high"] == int(first_high.timestamp())
    assert 3590 < told["drift_seconds"] < 3700
    assert told["blocked_by"] == "NO_FREE_DEVICE"


def test_who_preempted_whom_and_why_is_an_event_of_both_jobs(api: Api) -> None:
    with session_scope(api.engine) as session:
        worker = make_worker(session)
        poor, rich = make_caller(session), make_caller(session)
        victim = make_queued_job(session, rich, tunepool={"queue": {"tier": "best_effort"}})
        assert claim_on(session, worker) is not None
        long_ago = func.now() - timedelta(hours=1)
        session.execute(update(AttemptRow).where(AttemptRow.job_id == victim.id).values(started_at=long_ago))
        urgent = make_queued_job(session, poor, tunepool={"queue": {"tier": "interactive"}})
        assert claim_on(session, worker) is None
        told = {
            job.id: session.scalars(
                select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.seq.desc())
            ).first()
            for job in (victim, urgent)
        }
        session.refresh(victim)
        session.execute(update(ProjectRow).values(held=False))

    assert victim.preempt_requested_at is not None
    assert told[victim.id].data == {"preempted_for": urgent.id}
    assert told[urgent.id].data == {"preempts": victim.id}
    assert "a job of a higher tier waits" in told[urgent.id].message


def test_the_pool_tells_who_gives_devices_away_and_who_did_and_names_them_to_those_who_may(
    api: Api, operator: httpx2.Client
) -> None:
    with session_scope(api.engine) as session:
        worker = make_worker(session, devices=2)
        caller, key = make_key(session)
        session.execute(update(JobRow).where(JobRow.status == "queued").values(held=True))
        claims = []
        for _ in range(2):
            make_queued_job(session, caller)
            claim = claim_on(session, worker)
            assert claim is not None
            claims.append(claim)
        leaving, gone = (claim.lease for claim in claims)
        session.execute(update(JobRow).where(JobRow.id == leaving.id).values(preempt_requested_at=func.now()))
        assert moves.give_back(session, gone, outcome="drained", code="drained", message="…", settings=api.settings)
    with api.http(key) as theirs, api.http() as others:
        own = theirs.get("/v1/tunepool/pool").json()["preemptions"]
        foreign = others.get("/v1/tunepool/pool").json()["preemptions"]
    seen = operator.get("/v1/tunepool/pool").json()["preemptions"]

    mine = [
        (each["job_id"], each["attempt"], each["reason"], each["ended_at"] is None) for each in own if each["job_id"]
    ]
    assert mine == [(leaving.id, None, "queue", True), (gone.id, 1, "drain", False)]
    assert {leaving.id, gone.id} <= {each["job_id"] for each in seen}
    assert len(foreign) == len(seen)
    assert not {leaving.id, gone.id} & {each["job_id"] for each in foreign}
    assert not any(each["project_id"] == caller.project_id for each in foreign)


def test_an_administrator_sees_everybodys_jobs_and_the_order_of_the_queue(
    api: Api, operator: httpx2.Client, stranger: str
) -> None:
    running = queued(api)
    assert pull(api, worker_of(api)) is not None
    waiting = queued(api)

    full = operator.get("/v1/tunepool/pool").json()
    with api.http(stranger) as other:
        partial = other.get("/v1/tunepool/pool").json()

    assert [one["job_id"] for one in full["devices"] if one["leased"]] == [running]
    assert [(one["job_id"], one["position"], one["blocked_by"]) for one in full["queue"]] == [
        (waiting, 1, "NO_FREE_DEVICE")
    ]
    assert api.caller.project_id in [one["id"] for one in full["projects"]]
    assert [(one["job_id"], one["project_id"], one["detail"]) for one in partial["queue"]] == [(None, None, None)]
    assert api.caller.project_id not in str(partial)
    assert running not in str(partial)


def test_a_gang_never_waits_for_devices_of_two_workers_on_one_host_together(api: Api) -> None:
    with session_scope(api.engine) as session:
        workers = [make_worker(session), make_worker(session)]
        for worker in workers:
            session.execute(update(DeviceRow).where(DeviceRow.worker_id == worker.id).values(host="shared-host"))
        gang = make_queued_job(session, api.caller)
        gang.gpus = 2
        single = make_queued_job(session, api.caller)
        session.flush()
        claims = [claim for worker in workers if (claim := claim_on(session, worker)) is not None]
        verdict = verdict_of(session, gang.id)

    assert [claim.lease.id for claim in claims] == [single.id]
    assert verdict is not None
    assert verdict.blocked_by == "NO_WORKER"


def test_the_rules_of_a_pool_are_edited_and_go_back_to_their_defaults(api: Api, operator: httpx2.Client) -> None:
    edited = operator.patch("/v1/tunepool/pool", json={"min_runtime_seconds": 5, "max_wait_seconds": 60}).json()
    back = operator.patch("/v1/tunepool/pool", json={"min_runtime_seconds": None, "max_wait_seconds": None}).json()

    assert (edited["policy"]["min_runtime_seconds"], edited["policy"]["max_wait_seconds"]) == (5, 60)
    assert (back["policy"]["min_runtime_seconds"], back["policy"]["max_wait_seconds"]) == (600, 86400)
    refused(api, operator.patch("/v1/tunepool/pool", json={"min_runtime_seconds": -1}))
