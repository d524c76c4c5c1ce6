"""Expected durations: measured on what has ended, and the forecast rests on them."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.contract.spec import DataFacts, JobSpec
from shared.fleet import snapshot
from shared.jobs import measurements, moves
from shared.settle import durations
from shared.store.tables import JobRow, WorkerRow
from tests.factories import claim_on, make_caller, make_queued_job, make_spec, make_worker


def spec_of(*, rows: int, method: str = "qlora", **training: object) -> JobSpec:
    data = DataFacts(format="chat", train_rows=rows, mean_characters=100.0)
    spec = make_spec(num_train_epochs=1, **training)
    adapter = spec.adapter.model_copy(update={"method": method})
    return spec.model_copy(update={"data": data, "adapter": adapter})


@pytest.fixture
def past(session: Session) -> Session:
    """No job has ended but those that a test names."""
    session.execute(update(JobRow).values(base_model="another"))
    return session


def ended(session: Session, spec: JobSpec, *, seconds: float) -> None:
    job = make_queued_job(session, make_caller(session))
    worker = session.scalars(select(WorkerRow)).first() or make_worker(session)
    claim = claim_on(session, worker)
    assert claim is not None
    assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": []})
    session.execute(
        update(JobRow).where(JobRow.id == job.id).values(device_seconds=seconds, spec=spec.model_dump(mode="json"))
    )


def expected(session: Session, spec: JobSpec) -> float | None:
    return durations.held_seconds(spec, ended=measurements.held(session, base_model=spec.base_model.name))


def test_without_a_measurement_nothing_is_expected(past: Session) -> None:
    assert expected(past, spec_of(rows=1000)) is None


def test_the_rate_of_jobs_that_have_ended_times_the_work_to_do(past: Session) -> None:
    ended(past, spec_of(rows=1000), seconds=100)

    assert expected(past, spec_of(rows=3000)) == pytest.approx(300)
    assert expected(past, spec_of(rows=3000, max_steps=100, batch_size=8)) == pytest.approx(80)


def test_the_nearest_in_size_count_because_short_jobs_mostly_load_the_model(past: Session) -> None:
    for _ in range(5):
        ended(past, spec_of(rows=10), seconds=60)
        ended(past, spec_of(rows=10_000), seconds=1000)

    assert expected(past, spec_of(rows=8000)) == pytest.approx(800)
    assert expected(past, spec_of(rows=12)) == pytest.approx(72)


def test_jobs_of_the_same_method_count_where_there_are_any(past: Session) -> None:
    ended(past, spec_of(rows=1000, method="full"), seconds=900)
    ended(past, spec_of(rows=1000), seconds=100)

    assert expected(past, spec_of(rows=1000)) == pytest.approx(100)
    assert expected(past, spec_of(rows=1000, method="dora")) == pytest.approx(500)


def test_a_job_that_goes_on_from_a_checkpoint_is_expected_to_need_what_was_left(past: Session) -> None:
    job = make_queued_job(past, make_caller(past))
    past.execute(
        update(JobRow).where(JobRow.id == job.id).values(expected_seconds=500.0, progress={"seconds_left": 40.0})
    )

    (waiting,) = (one for one in snapshot.snapshot(past, pool_name="default").queue if one.id == job.id)

    assert waiting.expected_seconds == 40.0
