"""Jobs that share a device, as rows: claimed in one transaction, ended one by one, charged for their parts."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from shared.fleet import snapshot
from shared.jobs import moves, shared_devices
from shared.lease.values import Claim
from shared.operating import census
from shared.plan.companions import Company
from shared.settings import Settings
from shared.store.tables import AttemptRow, DeviceRow, EventRow, JobRow, MeasurementRow, ProjectRow, WorkerRow
from shared.tenants.keys import Caller
from tests import invariants
from tests.factories import GIB, make_caller, make_queued_job, make_worker

COMPANY = Company(most=4, longest_seconds=600)


def small_job(session: Session, caller: Caller, *, ground: str | None = "tiny", base_bytes: int = GIB) -> JobRow:
    job = make_queued_job(session, caller)
    values = {"cotraining_ground": ground, "base_bytes": base_bytes, "expected_seconds": 60.0}
    session.execute(update(JobRow).where(JobRow.id == job.id).values(**values))
    session.refresh(job)
    return job


def claim(session: Session, worker: WorkerRow, company: Company | None = COMPANY) -> Claim:
    claimed = moves.claim_training(
        session, worker_id=worker.id, pool_name=worker.pool, lease_seconds=60, company=company
    )
    assert claimed is not None
    return claimed


def group(session: Session, count: int) -> list[Claim]:
    caller = make_caller(session)
    for _ in range(count):
        small_job(session, caller)
    leading = claim(session, make_worker(session))
    assert len(leading.companions) == count - 1
    return [leading, *leading.companions]


def holder(session: Session) -> tuple[str | None, int | None]:
    by, fence = session.execute(select(DeviceRow.leased_by, DeviceRow.fence)).one()
    return by, fence


def broken(session: Session) -> list[str]:
    return [one for one in invariants.broken(session) if not one.startswith("I10")]


def test_companions_are_leased_with_the_leading_job_and_each_has_its_own_attempt(session: Session) -> None:
    claims = group(session, 3)

    jobs = [session.get_one(JobRow, one.lease.id, populate_existing=True) for one in claims]
    attempts = session.scalars(select(AttemptRow).order_by(AttemptRow.job_id)).all()
    assert {job.status for job in jobs} == {"running"}
    assert [job.fence for job in jobs] == [one.lease.fence for one in claims]
    assert {tuple(row.device_ids) for row in attempts} == {claims[0].device_ids}
    assert [(row.together, row.device_share) for row in attempts] == [(3, pytest.approx(1 / 3))] * 3
    assert holder(session) == (claims[0].lease.id, claims[0].lease.fence)
    told = session.scalars(select(EventRow.message).where(EventRow.message.like("Trains together%"))).all()
    assert told == [f"Trains together with 2 others on {claims[0].device_ids[0]}"] * 3
    assert [job.charged_seconds for job in jobs] == [60.0] * 3
    assert broken(session) == []


def test_without_company_and_without_a_ground_a_job_is_alone(session: Session) -> None:
    caller = make_caller(session)
    small_job(session, caller)
    small_job(session, caller)
    worker = make_worker(session, devices=2)

    assert claim(session, worker, None).companions == ()
    session.execute(update(JobRow).values(cotraining_ground=None))
    assert claim(session, worker).companions == ()
    assert set(session.scalars(select(AttemptRow.together))) == {None}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_device_is_free_when_the_last_has_ended_and_not_before(session: Session, order: tuple[int, ...]) -> None:
    claims = group(session, 3)
    left = [one.lease.id for one in claims]

    for place in order:
        lease = claims[place].lease
        assert moves.fail(session, lease, code="c", message="m")
        left.remove(lease.id)
        by, _ = holder(session)
        assert by in left if left else by is None
        assert broken(session) == []


def test_each_is_charged_its_part_of_the_devices_time_and_no_memory_is_learned(session: Session) -> None:
    claims = group(session, 2)
    session.execute(update(AttemptRow).values(started_at=AttemptRow.started_at - timedelta(seconds=100)))
    for one, share in zip(claims, (0.25, 0.75), strict=True):
        shared_devices.note_share(session, one.lease, share)
        moves.succeed(
            session,
            one.lease,
            manifest={"prefix": "p", "files": []},
            trained_tokens=100,
            peak_bytes=GIB,
            train_seconds=50.0,
        )

    seconds = [session.get_one(JobRow, one.lease.id, populate_existing=True).device_seconds for one in claims]
    assert seconds == [pytest.approx(25, abs=1), pytest.approx(75, abs=2)]
    project = session.scalars(select(ProjectRow.usage)).one()
    assert project == pytest.approx(100, abs=3)
    assert session.scalars(select(MeasurementRow)).all() == []
    told = {(figure.name, figure.first): figure.value for figure in census.count(session)}
    assert (told["together", ""], told["together_now", ""]) == (2, 0)


def test_to_the_plan_a_group_is_one_job_on_one_device_and_whoever_stops_it_stops_all(session: Session) -> None:
    caller = make_caller(session)
    for _ in range(3):
        job = small_job(session, caller)
        session.execute(update(JobRow).where(JobRow.id == job.id).values(tier="best_effort"))
    worker = make_worker(session)
    leading = claim(session, worker)
    ids = sorted([leading.lease.id, *(one.lease.id for one in leading.companions)])
    (running,) = snapshot.snapshot(session, pool_name="default").running
    assert sorted([running.id, *running.companions]) == ids
    session.execute(update(AttemptRow).values(started_at=AttemptRow.started_at - timedelta(hours=1)))
    urgent = make_queued_job(session, caller)
    session.execute(update(JobRow).where(JobRow.id == urgent.id).values(tier="interactive"))

    moves.claim_training(session, worker_id=worker.id, pool_name="default", lease_seconds=60)

    asked = session.scalars(select(JobRow.id).where(JobRow.preempt_requested_at.is_not(None))).all()
    assert sorted(asked) == ids


@pytest.mark.parametrize(
    ("outcome", "kept"),
    [("crashed", False), ("lost", False), ("out_of_memory", False), ("preempted", True), ("drained", True)],
)
def test_what_broke_trains_alone_from_then_on(session: Session, outcome: str, kept: bool) -> None:
    leading = group(session, 2)[0]

    moves.give_back(session, leading.lease, outcome=outcome, code="c", message="m", settings=Settings())  # type: ignore[arg-type]

    job = session.get_one(JobRow, leading.lease.id, populate_existing=True)
    assert (job.cotraining_ground == "tiny") is kept


def test_a_group_of_a_lost_worker_is_taken_back_whole(session: Session) -> None:
    claims = group(session, 3)
    session.execute(text("update jobs set lease_until = now() - interval '1 hour' where status = 'running'"))

    assert sorted(moves.reap(session, settings=Settings())) == sorted(one.lease.id for one in claims)
    assert holder(session) == (None, None)
    assert broken(session) == []
