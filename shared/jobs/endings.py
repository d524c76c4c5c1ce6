"""How an attempt ends: each moves the job, frees its devices and charges the project, all or nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, case, func, select, update
from sqlalchemy.orm import Session

from shared.contract.documents import error_document
from shared.contract.spec import AutoValue, JobSpec
from shared.fleet import snapshot
from shared.ids import new_id
from shared.jobs import measurements, shared_devices
from shared.jobs.rows import held, model_name, touch
from shared.lease import journal, outbox
from shared.lease.journal import NewEvent
from shared.lease.values import NOTHING_NEW, Lease, NewFile
from shared.plan.capacity import ANY, Abilities
from shared.plan.companions import CommonGround
from shared.settings import Settings
from shared.store.lifecycle import COUNTED, AttemptOutcome, JobStatus, is_terminal
from shared.store.tables import AdapterRow, AttemptRow, FileRow, JobRow


def validated(
    session: Session,
    lease: Lease,
    *,
    spec: JobSpec,
    auto: Sequence[AutoValue],
    bytes_per_device: int,
    needs: Abilities = ANY,
    expected_seconds: float | None = None,
    settled_for: dict[str, Any] | None = None,
    ground: CommonGround | None = None,
    events: Sequence[NewEvent] = (),
) -> bool:
    """validating_files -> queued, or paused where that was asked for meanwhile, with every value settled.

    Args:
        needs: what it asks of devices besides memory; `settled_for`: the device that it was settled for.
        ground: what it shares with jobs that train together with it; None: it trains alone.
        events: what the files' checks have to say.
    """
    moved = session.execute(
        update(JobRow)
        .where(*held(lease), JobRow.status == "validating_files")
        .values(
            status=case((JobRow.pause_requested_at.is_not(None), "paused"), else_="queued"),
            pause_requested_at=None,
            spec=spec.model_dump(mode="json"),
            auto=[value.model_dump(mode="json") for value in auto],
            gpus=spec.placement.gpus,
            nodes=spec.placement.nodes,
            bytes_per_device=bytes_per_device,
            needs_gpu=needs.gpu,
            needs_bfloat16=needs.bfloat16,
            needs_capability=needs.capability or None,
            expected_seconds=expected_seconds,
            settled_for=settled_for,
            cotraining_ground=None if ground is None else ground.words,
            base_bytes=None if ground is None else ground.base_bytes,
            queued_at=func.now(),
            lease_owner=None,
            lease_until=None,
            failures=0,
            version=JobRow.version + 1,
        )
        .returning(JobRow.status)
    ).one_or_none()
    if moved is not None:
        paused = [NewEvent("Job paused")] if moved.status == "paused" else []
        journal.append(session, lease.id, [*events, NewEvent("Files validated, moving job to queued state"), *paused])
    return moved is not None


def succeed(
    session: Session,
    lease: Lease,
    *,
    manifest: dict[str, Any],
    result_file: NewFile | None = None,
    trained_tokens: int | None = None,
    peak_bytes: int | None = None,
    train_seconds: float | None = None,
    reason: str = "",
) -> bool:
    """running -> succeeded: the one act that publishes. False when cancelled first, or fenced off."""
    job = _settle(
        session,
        lease,
        "succeeded",
        outcome="succeeded",
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"manifest": manifest, "trained_tokens": trained_tokens, "error": None},
        attempt_values={"peak_bytes": peak_bytes, "exit_code": 0},
    )
    if job is None:
        return False
    name = model_name(session, job)
    if result_file is not None:
        session.add(FileRow(project_id=job.project_id, status="processed", **_as_row(result_file)))
        session.flush()
    session.add(
        AdapterRow(
            id=new_id("adapter_"),
            job_id=job.id,
            project_id=job.project_id,
            name=name,
            base_model=job.base_model,
            manifest=manifest,
        )
    )
    if peak_bytes and trained_tokens and train_seconds:
        _measure(session, job, lease, peak_bytes=peak_bytes, trained_tokens=trained_tokens, train_seconds=train_seconds)
    touch(session, job.id, fine_tuned_model=name, result_file=result_file.id if result_file else None)
    journal.append(
        session,
        job.id,
        [
            NewEvent(f"New fine-tuned model created: {name}", data={"reason": reason} if reason else None),
            NewEvent("The job has successfully completed"),
        ],
    )
    return True


def _measure(session: Session, job: JobRow, lease: Lease, **took: Any) -> None:
    """For later estimates. What several jobs held together is nobody's own."""
    attempt = session.execute(
        select(AttemptRow.device_ids, AttemptRow.together).where(
            AttemptRow.job_id == job.id, AttemptRow.fence == lease.fence
        )
    ).one_or_none()
    if attempt is None or attempt.together is None:
        measurements.record(session, job, device_ids=() if attempt is None else attempt.device_ids, **took)


def _as_row(file: NewFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": file.bytes,
        "sha256": file.sha256,
        "key": file.key,
    }


def fail(
    session: Session,
    lease: Lease,
    *,
    code: str,
    message: str,
    param: str | None = None,
    exit_code: int | None = None,
    outcome: AttemptOutcome = "failed",
    peak_bytes: int | None = None,
) -> bool:
    """running or validating_files -> failed, for good. A cancel that was asked first wins."""
    error = error_document(code, message, param=param)
    job = _settle(
        session,
        lease,
        "failed",
        outcome=outcome,
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"error": error},
        attempt_values={"exit_code": exit_code, "error": error, "peak_bytes": peak_bytes},
    )
    if job is None:
        return False
    journal.append(session, job.id, [NewEvent(message, level="error", data={"code": code, "param": param})])
    return True


def fail_waiting(
    session: Session, *which: ColumnElement[bool], code: str, message: str, param: str | None = None
) -> list[str]:
    """queued -> failed, for jobs that nobody could ever start. Returns their ids."""
    ended = session.scalars(
        update(JobRow)
        .where(JobRow.status == "queued", *which)
        .values(
            status="failed",
            error=error_document(code, message, param=param),
            finished_at=func.now(),
            estimated_finish=None,
            version=JobRow.version + 1,
        )
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    event = NewEvent(message, level="error", data={"code": code, "param": param})
    journal.append_to_each(session, list(ended), event)
    return list(ended)


def confirm_cancelled(session: Session, lease: Lease, *, exit_code: int | None = None) -> bool:
    """running -> cancelled, once the trainer is proven dead."""
    job = _settle(
        session,
        lease,
        "cancelled",
        outcome="cancelled",
        only_if=JobRow.cancel_requested_at.is_not(None),
        attempt_values={"exit_code": exit_code},
    )
    if job is not None:
        journal.append(session, job.id, [NewEvent("Job cancelled; the trainer has stopped and its devices are free")])
    return job is not None


def confirm_paused(session: Session, lease: Lease, *, exit_code: int | None = None) -> bool:
    """running -> paused, once the trainer has checkpointed and stopped."""
    job = _settle(
        session,
        lease,
        "paused",
        outcome="paused",
        only_if=JobRow.cancel_requested_at.is_(None),
        job_values={"pause_requested_at": None},
        attempt_values={"exit_code": exit_code},
    )
    if job is not None:
        journal.append(session, job.id, [NewEvent("Job paused; its last checkpoint is kept")])
    return job is not None


def give_back(
    session: Session,
    lease: Lease,
    *,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    settings: Settings,
    exit_code: int | None = None,
    peak_bytes: int | None = None,
    next_try: Mapping[str, Any] = NOTHING_NEW,
) -> JobStatus | None:
    """End the attempt and queue the job again, or fail it when its attempts are used up.

    Returns the status it has now, None when the lease is lost. Outcomes outside `lifecycle.COUNTED` use up no attempt
    and wait for no back-off. A cancel that was asked first wins. `next_try`: columns that change for it. A job that
    broke, or ran out of memory, shares no device any more.
    """
    job = session.scalars(
        select(JobRow).where(*held(lease), JobRow.status == "running").with_for_update()
    ).one_or_none()
    if job is None:
        return None
    if job.cancel_requested_at is not None:
        return "cancelled" if confirm_cancelled(session, lease, exit_code=exit_code) else None
    counted = outcome in COUNTED
    if counted and job.failures + 1 >= settings.max_attempts:
        last = f"{message} This was attempt {job.failures + 1} of {settings.max_attempts}."
        ended = fail(
            session, lease, code=code, message=last, exit_code=exit_code, outcome=outcome, peak_bytes=peak_bytes
        )
        return "failed" if ended else None
    wait = backoff_seconds(job.failures, settings=settings) if counted else 0.0
    settled = _settle(
        session,
        lease,
        "queued",
        outcome=outcome,
        job_values={
            "failures": JobRow.failures + (1 if counted else 0),
            "not_before": func.now() + timedelta(seconds=wait) if wait else None,
            "preempt_requested_at": None,
            **({"cotraining_ground": None} if counted or outcome == "out_of_memory" else {}),
            **next_try,
        },
        attempt_values={
            "exit_code": exit_code,
            "peak_bytes": peak_bytes,
            "error": error_document(code, message),
        },
    )
    if settled is None:
        return None
    facts = {"code": code, "outcome": outcome, "wait_seconds": round(wait, 1)}
    journal.append(session, job.id, [NewEvent(message, level="warn" if counted else "info", data=facts)])
    return "queued"


def backoff_seconds(failures: int, *, settings: Settings) -> float:
    """Full jitter: uniform below base × 2^failures, capped (AWS blog, "Exponential Backoff And Jitter")."""
    ceiling = min(settings.backoff_cap_seconds, settings.backoff_base_seconds * 2**failures)
    return random.uniform(0, ceiling)  # noqa: S311  # spreading load, no secret


def _settle(
    session: Session,
    lease: Lease,
    status: JobStatus,
    *,
    outcome: AttemptOutcome,
    only_if: ColumnElement[bool] | None = None,
    job_values: dict[str, Any] | None = None,
    attempt_values: dict[str, Any] | None = None,
) -> JobRow | None:
    """End an attempt: move the job, free its devices, close the attempt, charge the project. All or nothing."""
    final = is_terminal(status)
    job = session.execute(
        update(JobRow)
        .where(*held(lease), *(() if only_if is None else (only_if,)))
        .values(
            status=status,
            lease_owner=None,
            lease_until=None,
            finished_at=func.now() if final else None,
            estimated_finish=None,
            version=JobRow.version + 1,
            **(job_values or {}),
        )
        .returning(JobRow)
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()
    if job is None:
        return None
    if final:
        outbox.tell(session, [job.id], status=status)
    seconds = _close_attempt(session, lease, outcome=outcome, **(attempt_values or {}))
    if seconds is not None:
        # The charge made at the lease becomes the real one.
        snapshot.charge(session, job.project_id, seconds=seconds - job.charged_seconds)
        touch(session, job.id, device_seconds=JobRow.device_seconds + seconds, charged_seconds=0.0)
    return job


def _close_attempt(session: Session, lease: Lease, **values: Any) -> float | None:
    """The device-seconds it took, by its lease and not by wall time; None where there was none: a check of files.

    Its devices are let go.
    """
    ended = session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == lease.id, AttemptRow.fence == lease.fence, AttemptRow.ended_at.is_(None))
        .values(ended_at=func.now(), **values)
        .returning(
            *(AttemptRow.started_at, AttemptRow.ended_at, AttemptRow.device_ids),
            *(AttemptRow.together, AttemptRow.device_share),
        )
    ).one_or_none()
    if ended is None:
        return None
    shared_devices.let_go(session, lease, ended.device_ids, shared=ended.together is not None)
    share = 1.0 if ended.device_share is None else ended.device_share
    return float((ended.ended_at - ended.started_at).total_seconds() * len(ended.device_ids) * share)
