"""Measurements of finished jobs: memory beside the prediction, training speed, time on devices.

The memory of the next ones rests on it (`sizing`) and their time (`durations`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.contract.passes import device_kind
from shared.contract.spec import JobSpec, MethodName
from shared.settle.calibration import Measurement
from shared.settle.sizing import estimate
from shared.settle.workload import workload
from shared.store.tables import DeviceRow, JobRow, MeasurementRow

KEPT: Final = 200  # the newest of a kind that are looked at
REMEMBERED: Final = 50  # their specs are read, too: enough to see past one odd job


def record(
    session: Session,
    job: JobRow,
    *,
    device_ids: Sequence[str],
    peak_bytes: int,
    trained_tokens: int,
    train_seconds: float,
) -> None:
    """Store the measurement of a job. A job is measured once; devices that are no longer known are left out."""
    device = session.get(DeviceRow, device_ids[0]) if device_ids else None
    if device is None or job.spec is None or peak_bytes <= 0:
        return
    if job.pass_tokens is not None:  # its passes were smaller than the formula assumes
        return
    kind = device_kind(device.kind)
    work = workload(as_run(job), device=kind, memory=device.total_bytes)
    session.execute(
        insert(MeasurementRow)
        .values(
            job_id=job.id,
            base_model=job.base_model,
            method=work.method,
            device_kind=kind,
            device_name=device.name,
            pass_tokens=work.tokens,
            predicted_bytes=estimate(work).total,
            measured_bytes=peak_bytes,
            trained_tokens=trained_tokens,
            train_seconds=train_seconds,
        )
        .on_conflict_do_nothing()
    )


def as_run(job: JobRow) -> JobSpec:
    """The job's spec with the micro-batch and checkpointing that its last attempt had after running out of memory."""
    spec = JobSpec.model_validate(job.spec)
    changed = {
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_checkpointing": job.gradient_checkpointing,
    }
    given: dict[str, int | None] = {name: value for name, value in changed.items() if value is not None}
    if job.gradient_checkpointing is not None:  # what an attempt without room is given recomputes every layer
        given["gradient_checkpointing_layers"] = None
    return spec.model_copy(update={"training": spec.training.model_copy(update=given)})


def of_kind(session: Session, *, base_model: str) -> list[Measurement]:
    """The newest measurements of a base model, of every method and kind of device."""
    rows = session.scalars(
        select(MeasurementRow)
        .where(MeasurementRow.base_model == base_model)
        .order_by(MeasurementRow.created_at.desc())
        .limit(KEPT)
    )
    return [_measurement(row) for row in rows]


def speeds(session: Session, *, base_model: str, method: MethodName, device_name: str) -> list[float]:
    """Trained tokens a second of the newest jobs of this base model and method on such a device, newest first."""
    rows = session.execute(
        select(MeasurementRow.trained_tokens, MeasurementRow.train_seconds)
        .where(
            MeasurementRow.base_model == base_model,
            MeasurementRow.method == method,
            MeasurementRow.device_name == device_name,
            MeasurementRow.train_seconds > 0,
        )
        .order_by(MeasurementRow.created_at.desc())
        .limit(KEPT)
    )
    return [row.trained_tokens / row.train_seconds for row in rows]


def held(session: Session, *, base_model: str) -> list[tuple[JobSpec, float]]:
    """The newest jobs of a base model that succeeded, each with the device-seconds that it took."""
    ended = session.execute(
        select(JobRow.spec, JobRow.device_seconds)
        .where(JobRow.base_model == base_model, JobRow.status == "succeeded", JobRow.device_seconds > 0)
        .order_by(JobRow.finished_at.desc())
        .limit(REMEMBERED)
    )
    return [
        (JobSpec.model_validate(document, extra="ignore"), seconds)  # a newer version's, maybe
        for document, seconds in ended
        if document is not None
    ]


def _measurement(row: MeasurementRow) -> Measurement:
    return Measurement(
        base=row.base_model,
        method=cast("MethodName", row.method),
        tokens=row.pass_tokens,
        predicted=row.predicted_bytes,
        measured=row.measured_bytes,
        device=device_kind(row.device_kind),
    )
