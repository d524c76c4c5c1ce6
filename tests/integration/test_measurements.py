"""What finished jobs teach the next ones: recorded with the success, read by admission and by predictions of time."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shared.contract.spec import DataFacts
from shared.jobs import measurements, moves
from shared.settle.catalogue import SMOLLM2
from shared.settle.resolve import Resolution, resolve
from shared.settle.settling import DeviceFacts
from shared.settle.sizing import estimate
from shared.settle.workload import workload
from shared.store.tables import DeviceRow, JobRow, MeasurementRow
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_caller, make_queued_job, make_request, make_spec, make_worker

MANIFEST = {"prefix": "p", "files": []}
BASE = SMOLLM2.ref.name
MEMORY = 16 << 30  # of the devices of tests.factories


def finish(session: Session, caller: Caller, *, ratio: float = 1.2, shrunk: bool = False, **worker: Any) -> JobRow:
    """A job that succeeds with `ratio` times its predicted peak."""
    job = make_queued_job(session, caller)
    if shrunk:
        job.micro_batch_size, job.gradient_checkpointing = 1, True
        session.flush()
    claim = claim_on(session, make_worker(session, **{"kind": "cpu", "name": "CPU", **worker}))
    assert claim is not None
    predicted = estimate(workload(measurements.as_run(job), device="cpu", memory=MEMORY)).total
    peak = int(ratio * predicted)
    assert moves.succeed(
        session, claim.lease, manifest=MANIFEST, trained_tokens=1000, peak_bytes=peak, train_seconds=10.0
    )
    session.execute(delete(DeviceRow))  # so that the next job comes to the next worker
    return job


def settled(session: Session) -> Resolution:
    return resolve(
        make_request("file-1", tunepool={"training": {"packing": True, "max_length": 2048}}),
        base=SMOLLM2.ref,
        data=DataFacts(format="chat", train_rows=20, mean_characters=100.0, max_characters=200),
        device=DeviceFacts(kind="cpu", total_bytes=16 << 30, free_bytes=16 << 30, bfloat16=True),
        seed=1,
        measurements=measurements.of_kind(session, base_model=BASE),
    )


def test_a_success_leaves_its_peak_beside_what_was_predicted_of_the_attempt_as_it_ran(session: Session) -> None:
    job = finish(session, make_caller(session), shrunk=True)

    row = session.scalars(select(MeasurementRow).where(MeasurementRow.job_id == job.id)).one()
    asked = make_spec(per_device_train_batch_size=1, gradient_checkpointing=True)
    assert row.predicted_bytes == estimate(workload(asked, device="cpu", memory=MEMORY)).total
    assert row.measured_bytes == int(1.2 * row.predicted_bytes)
    assert (row.base_model, row.method, row.device_kind) == (BASE, "qlora", "cpu")


@pytest.mark.parametrize(("kind", "name"), [("cuda", "NVIDIA L4"), ("rocm", "Instinct MI300X")])
def test_what_a_trainer_has_measured_on_a_gpu_is_stored_as_it_is(session: Session, kind: str, name: str) -> None:
    job = finish(session, make_caller(session), kind=kind, name=name)

    row = session.get_one(MeasurementRow, job.id)
    assert row.device_kind == "cuda"
    assert row.measured_bytes == int(1.2 * estimate(workload(make_spec(), device="cpu", memory=MEMORY)).total)


def test_finished_jobs_move_what_the_next_one_asks_for_and_its_reason_says_so(session: Session) -> None:
    before = settled(session)
    for _ in range(5):
        finish(session, make_caller(session))
    after = settled(session)

    assert before.calibration.count == 0
    assert after.calibration.count == 5
    assert after.calibration.factor == pytest.approx(1.2, rel=0.03)
    assert after.bytes_per_device > after.estimate.total
    assert after.calibration.spread < before.calibration.spread
    reason = next(one.reason for one in after.auto if one.field == "training.gradient_checkpointing")
    assert "5 finished jobs of this kind" in reason


def test_jobs_of_another_kind_of_device_teach_nothing(session: Session) -> None:
    finish(session, make_caller(session), kind="cuda", name="NVIDIA L4")

    assert settled(session).calibration.count == 0


def test_speeds_are_those_of_the_same_device(session: Session) -> None:
    finish(session, make_caller(session))

    assert measurements.speeds(session, base_model=BASE, method="qlora", device_name="CPU") == [100.0]
    assert measurements.speeds(session, base_model=BASE, method="qlora", device_name="NVIDIA L4") == []
    assert measurements.speeds(session, base_model=BASE, method="full", device_name="CPU") == []
