"""Leases over several hosts, against a real Postgres: all devices or none, one fence, members without rights."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session

from api.views import job_views, pool_views
from shared.chores.table import leased_rows
from shared.contract.spec import Placement
from shared.fleet import members, snapshot, workers
from shared.ids import new_id
from shared.jobs import claims, moves
from shared.lease.values import Claim, MeetingPlace, Membership
from shared.operating.overview import overview
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import AttemptRow, DeviceRow, JobRow, MemberRow, WorkerRow
from shared.tenants import usage
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_caller, make_queued_job, make_worker, verdict_of
from tests.invariants import broken

TWO_BY_TWO = Placement(strategy="ddp", gpus=2, nodes=2)
PLACE = MeetingPlace(name="job-1-random", address="10.0.0.1", port=29500)


def two_hosts(session: Session, **values: Any) -> tuple[WorkerRow, WorkerRow]:
    return make_worker(session, devices=2, **values), make_worker(session, devices=2, **values)


def led(session: Session) -> tuple[JobRow, Claim, Membership, WorkerRow]:
    """A running gang: its job, the leader's claim, the member's part, the member's worker."""
    job = make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, other = two_hosts(session)
    claim = claim_on(session, leader)
    part = moves.claim_membership(session, worker_id=other.id)
    assert claim is not None
    assert part is not None
    return job, claim, part, other


def holders(session: Session) -> set[tuple[str | None, int | None]]:
    return {
        (row.leased_by, row.fence)
        for row in session.scalars(select(DeviceRow).execution_options(populate_existing=True))
    }


def test_a_claim_takes_all_devices_of_all_hosts_under_one_fence(session: Session) -> None:
    job = make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, other = two_hosts(session)

    claim = claim_on(session, leader)

    assert claim is not None
    assert claim.device_ids == (f"{leader.id}:0", f"{leader.id}:1")
    (member,) = claim.members
    assert (member.node, member.worker_id) == (1, other.id)
    assert member.device_ids == (f"{other.id}:0", f"{other.id}:1")
    assert holders(session) == {(job.id, claim.lease.fence)}
    attempt = session.scalars(select(AttemptRow).where(AttemptRow.job_id == job.id)).one()
    assert attempt.device_ids == [*claim.device_ids, *member.device_ids]
    assert claim_on(session, other) is None
    assert broken(session) == []


def test_nothing_is_leased_while_one_host_lacks_a_device(session: Session) -> None:
    job = make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, _ = make_worker(session, devices=2), make_worker(session, devices=1)

    assert claim_on(session, leader) is None

    assert holders(session) == {(None, None)}
    verdict = verdict_of(session, job.id)
    assert verdict is not None
    assert verdict.blocked_by == "NO_WORKER"
    assert "needs 2 hosts with 2 devices each" in verdict.detail


def test_hosts_with_devices_of_unlike_kinds_are_no_gang(session: Session) -> None:
    make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    gpus = make_worker(session, devices=2)
    make_worker(session, devices=2, kind="cpu")

    assert claim_on(session, gpus) is None


def test_a_host_that_goes_away_after_the_plan_leaves_the_job_waiting_and_nothing_leased(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, other = two_hosts(session)
    planned = snapshot.make_plan

    def plan_and_lose_a_host(view: snapshot.Snapshot) -> Any:
        made = planned(view)
        owners = claims._owners(session, "default")
        monkeypatch.setattr(claims, "_owners", lambda *_: owners)
        session.execute(delete(DeviceRow).where(DeviceRow.id == f"{other.id}:1"))
        return made

    monkeypatch.setattr(snapshot, "make_plan", plan_and_lose_a_host)

    assert claim_on(session, leader) is None
    session.refresh(job)
    assert job.status == "queued"
    assert holders(session) == {(None, None)}


@pytest.mark.parametrize("end", ["fail", "give_back", "succeed", "reap"])
def test_however_it_ends_the_devices_of_all_hosts_are_free_at_once_and_charged(
    session: Session, settings: Settings, end: str
) -> None:
    job, claim, _, _ = led(session)
    session.execute(update(AttemptRow).values(started_at=AttemptRow.started_at - timedelta(seconds=100)))
    if end == "fail":
        moves.fail(session, claim.lease, code="internal_error", message="It broke.")
    elif end == "give_back":
        moves.give_back(session, claim.lease, outcome="crashed", code="c", message="It broke.", settings=settings)
    elif end == "succeed":
        moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})
    else:
        session.execute(update(JobRow).values(lease_until=func.to_timestamp(0)))
        assert moves.reap(session, settings=settings) == [job.id]

    session.refresh(job)
    assert holders(session) == {(None, None)}
    assert job.device_seconds == pytest.approx(400, abs=1)
    assert usage.this_month(session, [job.project_id])[job.project_id] == pytest.approx(400, abs=1)


def test_the_meeting_point_is_told_under_the_fence_alone(session: Session, settings: Settings) -> None:
    _, claim, part, _ = led(session)
    before = members.report(session, part, phase="ready", leaving=False)

    assert members.meet(session, claim.lease, PLACE)
    after = members.report(session, part, phase="ready", leaving=False)
    moves.give_back(session, claim.lease, outcome="crashed", code="c", message="It broke.", settings=settings)

    assert before == members.MemberAnswer(None)
    assert after == members.MemberAnswer(PLACE)
    assert not members.meet(session, claim.lease, PLACE)
    assert members.report(session, part, phase="training", leaving=False) is None


def test_a_member_of_an_older_attempt_hears_nothing_of_the_newer_one(session: Session, settings: Settings) -> None:
    _, claim, part, other = led(session)
    moves.give_back(session, claim.lease, outcome="drained", code="c", message="It broke.", settings=settings)
    leader = session.get_one(WorkerRow, claim.lease.worker_id)
    newer = claim_on(session, leader)
    assert newer is not None
    members.meet(session, newer.lease, PLACE)

    stale = members.report(session, part, phase="ready", leaving=False)
    members.end(session, part, exit_code=1)

    assert stale is None
    assert [state.phase for state in members.states(session, newer.lease)] == ["called"]
    assert moves.claim_membership(session, worker_id=other.id) is not None


@pytest.mark.parametrize("order", ["cancel", "dismiss"])
def test_a_member_that_is_needed_no_more_hears_so(session: Session, order: str) -> None:
    job, claim, part, _ = led(session)
    if order == "cancel":
        moves.request_cancel(session, job.id, project_id=job.project_id)
    else:
        assert members.dismiss(session, claim.lease)

    assert members.report(session, part, phase="training", leaving=False) is None


def test_a_call_is_rung_for_until_it_is_answered_and_answered_once(session: Session) -> None:
    make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, other = two_hosts(session)
    assert claim_on(session, leader) is not None

    assert members.called(session) == {other.id: "default"}
    assert members.is_called(session, other.id)
    assert not members.is_called(session, leader.id)
    assert moves.claim_membership(session, worker_id=other.id) is not None
    assert members.called(session) == {}
    assert moves.claim_membership(session, worker_id=other.id) is None


def test_the_pool_and_the_job_show_every_host_and_only_to_whom_it_concerns(session: Session) -> None:
    job, claim, part, _ = led(session)
    owner = Caller("", job.project_id, "", "", frozenset())
    found = overview(session, pool_name="default")

    mine, theirs = (
        pool_views.pool(found, caller=caller).gangs for caller in (owner, make_caller(session, scopes=("jobs:read",)))
    )
    attempt = job_views.attempt(session.scalars(select(AttemptRow)).one(), members.of_job(session, job.id)[1])

    assert [(seat.job_id, seat.node, seat.phase) for seat in mine] == [(job.id, 0, "leased"), (job.id, 1, "staging")]
    assert [seat.devices for seat in mine] == [list(claim.device_ids), list(part.claim.device_ids)]
    assert [seat.job_id for seat in theirs] == [None, None]
    assert [(one.node, one.devices) for one in attempt.members] == [(1, list(part.claim.device_ids))]


def test_a_call_of_an_attempt_that_has_ended_is_answered_by_nobody(session: Session) -> None:
    make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
    leader, other = two_hosts(session)
    claim = claim_on(session, leader)
    assert claim is not None
    members.dismiss(session, claim.lease)

    assert members.called(session) == {}
    assert moves.claim_membership(session, worker_id=other.id) is None


def test_a_worker_that_starts_anew_ends_its_parts_and_one_that_retires_leaves_them(session: Session) -> None:
    _, claim, _, other = led(session)
    known = workers.NewWorker(id=other.id, host=other.host, pool="default", boot_id="boot", version="test")

    workers.register(session, known, [], leased=leased_rows())
    (restarted,) = members.states(session, claim.lease)
    session.execute(update(MemberRow).values(phase="training", error=None))
    workers.retire(session, other.id)
    (retired,) = members.states(session, claim.lease)

    assert (restarted.phase, restarted.leaving) == ("ended", False)
    assert restarted.error == members.RESTARTED
    assert (retired.phase, retired.leaving, retired.error) == ("ended", True, None)
    assert holders(session) == {(claim.lease.id, claim.lease.fence)}


def test_two_workers_that_pull_at_once_make_one_gang(engine: Engine) -> None:
    name = new_id("pool-")[:40].lower()
    with session_scope(engine) as session:
        job = make_queued_job(session, make_caller(session), placement=TWO_BY_TWO)
        hosts = two_hosts(session, pool=name)
    claims: list[Claim | None] = []
    start = threading.Barrier(2)

    def pull(worker: WorkerRow) -> None:
        start.wait()
        with session_scope(engine) as own:
            claims.append(claim_on(own, worker))

    racers = [threading.Thread(target=pull, args=(host,)) for host in hosts]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()

    (claim,) = (claim for claim in claims if claim is not None)
    with session_scope(engine) as session:
        held = session.scalars(select(DeviceRow).where(DeviceRow.pool == name)).all()
        assert {(row.leased_by, row.fence) for row in held} == {(job.id, claim.lease.fence)}
        assert len(held) == 4
        assert moves.fail(session, claim.lease, code="internal_error", message="The test is over.")


def test_the_oracle_reports_a_move_that_the_page_of_states_does_not_list(session: Session) -> None:
    job = make_queued_job(session, make_caller(session))

    for status in ("paused", "validating_files"):
        session.execute(update(JobRow).where(JobRow.id == job.id).values(status=status))

    assert any(f"{job.id} paused -> validating_files" in line for line in broken(session))
