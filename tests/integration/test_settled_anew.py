"""A queued job that fits no device as it is settled is settled once more when the pool offers something else."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.fleet import workers
from shared.jobs import moves, settled_anew
from shared.plan.capacity import Abilities
from shared.store.tables import DeviceRow, EventRow, JobRow
from shared.tenants.keys import Caller
from tests.factories import GIB, claim_on, make_caller, make_job, make_queued_job, make_spec, make_worker, verdict_of


@pytest.fixture
def caller(session: Session) -> Caller:
    return make_caller(session)


def settled_here(
    session: Session, caller: Caller, *, needs: int = 15 * GIB, abilities: Abilities | None = None, **values: Any
) -> JobRow:
    """A job that the CPU lane settles for what the pool offers at this moment."""
    job = make_job(session, caller, **values)
    settle(session, needs=needs, abilities=abilities)
    session.refresh(job)
    return job


def settle(session: Session, *, needs: int, abilities: Abilities | None = None) -> None:
    claim = moves.claim_validation(session, worker_id="checker", lease_seconds=60)
    offer = settled_anew.pool_offer(session, "default")
    assert claim is not None
    assert offer is not None
    assert moves.validated(
        session,
        claim.lease,
        spec=make_spec(),
        auto=[],
        bytes_per_device=needs,
        needs=abilities or Abilities(),
        settled_for=settled_anew.noted(offer),
    )


def devices_have(session: Session, **values: Any) -> None:
    session.execute(update(DeviceRow).values(**values))


def test_a_job_that_a_desktop_has_crowded_out_is_settled_for_what_is_left(session: Session, caller: Caller) -> None:
    worker = make_worker(session)
    job = settled_here(session, caller)
    devices_have(session, free_bytes=13 * GIB)  # a desktop, which NVML lists among no processes
    verdict = verdict_of(session, job.id)
    assert verdict is not None
    assert verdict.blocked_by == "NO_FIT_MEMORY"

    assert moves.settle_anew(session) == [job.id]

    session.refresh(job)
    assert job.status == "validating_files"
    last = session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.seq.desc())).first()
    assert last is not None
    assert last.message.startswith("No device of the pool has what this job was settled for (15.0 GiB on each device)")
    settle(session, needs=12 * GIB)
    claim = claim_on(session, worker)
    assert claim is not None
    assert claim.lease.id == job.id


def test_a_job_that_no_other_settling_would_help_is_left_alone(session: Session, caller: Caller) -> None:
    make_worker(session)
    job = settled_here(session, caller, needs=20 * GIB)
    assert moves.settle_anew(session) == [], "settled for what there is: it asks for too much"
    devices_have(session, free_bytes=16 * GIB - GIB // 8)
    assert moves.settle_anew(session) == [], "within the reserve that every settling leaves"

    devices_have(session, free_bytes=14 * GIB)
    assert moves.settle_anew(session) == [job.id]
    settle(session, needs=20 * GIB)
    assert moves.settle_anew(session) == [], "once for each change"


def test_a_job_whose_kind_of_device_has_left_for_good_is_settled_for_what_stays(
    session: Session, caller: Caller
) -> None:
    old = make_worker(session, total_bytes=80 * GIB, free_bytes=80 * GIB, capability=80, bfloat16=True)
    make_worker(session, bfloat16=False, capability=75)
    job = settled_here(session, caller, abilities=Abilities(gpu=True, bfloat16=True, capability=80))
    devices_have(session, healthy=False)
    assert moves.settle_anew(session) == [], "an ailing device may be mended"
    devices_have(session, healthy=True)

    session.execute(update(DeviceRow).where(DeviceRow.worker_id == old.id).values(foreign_bytes=70 * GIB, free_bytes=0))
    assert moves.settle_anew(session) == [], "strangers end their work"

    session.delete(session.scalars(select(DeviceRow).where(DeviceRow.worker_id == old.id)).one())
    session.flush()
    assert moves.settle_anew(session) == [job.id]


def test_a_job_that_has_trained_keeps_its_values(session: Session, caller: Caller) -> None:
    make_worker(session)
    job = settled_here(session, caller)
    job.last_checkpoint = {"step": 1}
    session.flush()
    devices_have(session, free_bytes=13 * GIB)

    assert moves.settle_anew(session) == []


def test_a_job_that_wants_more_devices_than_there_are_waits_for_a_worker(session: Session, caller: Caller) -> None:
    make_worker(session)
    job = settled_here(session, caller)
    job.gpus = 4
    session.flush()
    devices_have(session, free_bytes=13 * GIB)

    assert moves.settle_anew(session) == []


def test_a_job_that_an_earlier_version_settled_is_settled_once(session: Session, caller: Caller) -> None:
    make_worker(session, total_bytes=GIB // 2, free_bytes=GIB // 2)
    job = make_queued_job(session, caller)
    assert job.settled_for is None

    assert moves.settle_anew(session) == [job.id]
    job.status = "queued"  # by a worker of that version: it notes nothing
    session.flush()

    assert moves.settle_anew(session) == []


def test_jobs_are_settled_for_the_gpu_that_offers_most_not_for_the_largest_one(
    session: Session, caller: Caller
) -> None:
    make_worker(session, total_bytes=24 * GIB, free_bytes=10 * GIB)
    whole = make_worker(session)

    best = workers.roomiest_device(session, pool_name="default")

    assert best is not None
    assert best.id.startswith(whole.id)
