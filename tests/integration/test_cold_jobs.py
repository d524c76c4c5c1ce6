"""Jobs whose base model is on no host that fits wait for its fetch, and no device waits with them."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.chores import cold_jobs, fetches
from shared.chores.fetches import Fetch
from shared.settle.catalogue import SMOLLM2
from shared.store.tables import EventRow, FetchRow, JobRow, WorkerRow
from shared.tenants.keys import Caller
from tests.factories import GIB, claim_on, make_caller, make_queued_job, make_worker, verdict_of

BASE = SMOLLM2.ref.name


@pytest.fixture
def caller(session: Session) -> Caller:
    return make_caller(session)


def cold_worker(session: Session, **values: object) -> WorkerRow:
    return make_worker(session, cached_models=[], **values)


def asked(session: Session) -> dict[str, str]:
    """Workers that were asked to fetch, with the state of that."""
    return {row.worker_id: row.state for row in session.scalars(select(FetchRow))}


def taken(session: Session, worker: WorkerRow) -> Fetch:
    found = fetches.claim(session, worker_id=worker.id, lease_seconds=60)
    assert found is not None
    return found


def told(session: Session, job: JobRow) -> list[str]:
    session.flush()
    return list(session.scalars(select(EventRow.message).where(EventRow.job_id == job.id).order_by(EventRow.seq)))


def test_hosts_that_could_take_the_job_fetch_its_base_and_no_device_is_leased(session: Session, caller: Caller) -> None:
    able = cold_worker(session)
    cold_worker(session, total_bytes=GIB // 2)  # too small
    cold_worker(session, healthy=False)
    job = make_queued_job(session, caller)

    assert cold_jobs.call_for(session, job.id) == 1

    assert asked(session) == {able.id: "waiting"}
    assert claim_on(session, able) is None
    verdict = verdict_of(session, job.id)
    assert verdict is not None
    assert verdict.blocked_by == "BASE_MODEL_FETCHING"
    assert f"{able.host} is about to fetch it" in verdict.detail
    assert told(session, job)[-1].startswith(
        f"The base model '{BASE}' is on no host that fits this job; 1 host fetches it."
    )


def test_the_bytes_are_told_and_the_job_starts_once_they_are_there(session: Session, caller: Caller) -> None:
    worker, job = cold_worker(session), make_queued_job(session, caller)
    cold_jobs.call_for(session, job.id)
    fetch = taken(session, worker)
    fetches.tell(session, fetch.lease, done=123_456, total=1_000_000)
    verdict = verdict_of(session, job.id)
    assert verdict is not None
    assert f"{worker.host} has 123,456 of 1,000,000 bytes" in verdict.detail

    assert cold_jobs.arrived(session, fetch, size=999_999)

    assert told(session, job)[-1] == f"The host '{worker.host}' has the base model '{BASE}' now (999,999 bytes)"
    claim = claim_on(session, worker)
    assert claim is not None
    assert claim.lease.id == job.id


def test_a_refused_fetch_ends_the_job_with_its_remedy_once_no_host_is_left(session: Session, caller: Caller) -> None:
    first, second = cold_worker(session), cold_worker(session)
    job, later = make_queued_job(session, caller), make_queued_job(session, caller)
    cold_jobs.call_for(session, job.id)
    refused = {"code": "base_model_forbidden", "error": "Give the workers HF_TOKEN."}

    cold_jobs.refuse(session, taken(session, first), **refused)
    session.refresh(job)
    assert job.status == "queued", "the other host may still bring it"
    cold_jobs.refuse(session, taken(session, second), **refused)

    for ended in (job, later):
        session.refresh(ended)
        assert ended.status == "failed"
        assert (ended.error["code"], ended.error["param"]) == ("base_model_forbidden", "model")
        assert ended.attempts == 0
        assert told(session, ended)[-1] == "Give the workers HF_TOKEN."


def test_a_refused_fetch_ends_no_job_that_another_host_can_do(session: Session, caller: Caller) -> None:
    cold, _warm = cold_worker(session), make_worker(session)
    job = make_queued_job(session, caller)
    assert cold_jobs.call_for(session, job.id) == 0, "it can start where its base model is"
    assert cold_jobs.call(session) == 1, "while it waits the other host gets it too"

    cold_jobs.refuse(session, taken(session, cold), code="base_model_forbidden", error="No.")

    session.refresh(job)
    assert job.status == "queued"


def test_a_source_that_is_away_blocks_the_job_and_is_asked_again_after_a_while(
    session: Session, caller: Caller
) -> None:
    worker, job = cold_worker(session), make_queued_job(session, caller)
    cold_jobs.call_for(session, job.id)
    for _ in range(3):
        cold_jobs.put_off(session, taken(session, worker), error="Its source is away.")
        session.execute(update(FetchRow).values(lease_until=None))

    assert asked(session) == {worker.id: "error"}
    session.refresh(job)
    verdict = verdict_of(session, job.id)
    assert verdict is not None
    assert (job.status, verdict.blocked_by) == ("queued", "BASE_MODEL_FETCHING")
    assert "could not fetch it: Its source is away; unblocked when" in verdict.detail
    assert "Its source is away. The job waits" in told(session, job)[-1]
    assert cold_jobs.call(session) == 0, "not at once"
    session.execute(update(FetchRow).values(updated_at=func.to_timestamp(0)))
    assert cold_jobs.call(session) == 1
    assert asked(session) == {worker.id: "waiting"}


def test_a_new_job_has_a_refused_host_look_again(session: Session, caller: Caller) -> None:
    worker, job = cold_worker(session), make_queued_job(session, caller)
    cold_jobs.call_for(session, job.id)
    cold_jobs.refuse(session, taken(session, worker), code="base_model_forbidden", error="No.")

    assert cold_jobs.call_for(session, make_queued_job(session, caller).id) == 1

    assert asked(session) == {worker.id: "waiting"}


def test_held_and_ended_jobs_have_nothing_fetched(session: Session, caller: Caller) -> None:
    cold_worker(session)
    held, ended = make_queued_job(session, caller), make_queued_job(session, caller)
    held.held, ended.status = True, "cancelled"
    session.flush()

    assert cold_jobs.call(session) == 0
