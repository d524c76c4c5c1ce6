"""The pool as rows show it: what waits, what runs, which devices there are, and what the plan says of each.

Reads only, but for `charge`; shared/jobs.py writes what a plan decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.capacity import Device
from shared.fairshare import charge as entry_charge
from shared.preemption import RunningJob
from shared.scheduling import Plan, Policy, QueuedJob, Share, decayed, plan
from shared.tables import AttemptRow, DeviceRow, JobRow, ProjectRow, WorkerRow
from shared.verdicts import Verdict

POLICY: Final = Policy()
HALF_LIFE_SECONDS: Final = POLICY.half_life.total_seconds()
# A worker reports itself every ten seconds; after this silence its devices are nobody's.
WORKER_SILENCE = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent look at a pool, in the plan's own terms."""

    now: datetime
    queue: tuple[QueuedJob, ...]
    running: tuple[RunningJob, ...]
    devices: tuple[Device, ...]
    shares: tuple[Share, ...]

    def charge(self, job_id: str) -> float:
        """Device-seconds that the job's project pays on entry."""
        return next((entry_charge(job, policy=POLICY) for job in self.queue if job.id == job_id), 0.0)


def snapshot(session: Session, *, pool_name: str) -> Snapshot:
    """Read the pool. Every job may run in every pool of this installation that has its devices."""
    now: datetime = session.scalars(select(func.now())).one()
    return Snapshot(
        now=now,
        queue=_queue(session),
        running=_running(session),
        devices=_devices(session, pool_name),
        shares=_shares(session, now),
    )


def make_plan(view: Snapshot) -> Plan:
    return plan(view.queue, view.running, view.devices, view.shares, policy=POLICY, now=view.now)


def _queue(session: Session) -> tuple[QueuedJob, ...]:
    columns = (
        JobRow.id,
        JobRow.project_id,
        JobRow.key_id,
        JobRow.created_at,
        JobRow.tier,
        JobRow.priority,
        JobRow.gpus,
        JobRow.nodes,
        JobRow.bytes_per_device,
        JobRow.max_runtime_seconds,
        JobRow.expected_seconds,
        JobRow.not_before,
        JobRow.preemptible,
        JobRow.held,
        JobRow.base_model,
    )
    return tuple(
        QueuedJob(*row)  # type: ignore[arg-type]  # the columns stand in the fields' order
        for row in session.execute(select(*columns).where(JobRow.status == "queued"))
    )


def _running(session: Session) -> tuple[RunningJob, ...]:
    rows = session.execute(
        select(JobRow, AttemptRow.device_ids, AttemptRow.started_at)
        .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.ended_at.is_(None)))
        .where(JobRow.status == "running")
    )
    return tuple(_running_job(job, tuple(device_ids), started_at) for job, device_ids, started_at in rows)


def _running_job(job: JobRow, device_ids: tuple[str, ...], started_at: datetime) -> RunningJob:
    return RunningJob(
        id=job.id,
        project=job.project_id,
        key=job.key_id,
        tier=job.tier,  # type: ignore[arg-type]  # text in the row; the spec keeps it in the set
        priority=job.priority,
        device_ids=device_ids,
        started_at=started_at,
        max_runtime_seconds=job.max_runtime_seconds,
        expected_seconds_left=_seconds_left(job.progress),
        preemptible=job.preemptible,
        preempt_requested=job.preempt_requested_at is not None,
        backfill=job.backfill,
    )


def _seconds_left(progress: dict[str, Any] | None) -> float | None:
    left = (progress or {}).get("seconds_left")
    return None if left is None else float(left)


def _devices(session: Session, pool_name: str) -> tuple[Device, ...]:
    rows = session.execute(
        select(DeviceRow, WorkerRow.draining)
        .join(WorkerRow, WorkerRow.id == DeviceRow.worker_id)
        .where(DeviceRow.pool == pool_name, WorkerRow.last_seen > func.now() - WORKER_SILENCE)
    )
    return tuple(
        Device(
            id=row.id,
            host=row.host,
            total_bytes=row.total_bytes,
            free_bytes=row.free_bytes,
            pool=row.pool,
            leased_by=row.leased_by,
            healthy=row.healthy and not row.quarantined,
            draining=draining,
            foreign_bytes=row.foreign_bytes,
            cached_models=frozenset(row.cached_models),
        )
        for row, draining in rows
    )


def _shares(session: Session, now: datetime) -> tuple[Share, ...]:
    return tuple(
        Share(
            project=row.id,
            weight=row.weight,
            usage=decayed(row.usage, elapsed=now - row.usage_at, half_life=POLICY.half_life),
            guarantee=row.guarantee,
            max_running=row.max_running,
            budget_left_seconds=row.budget_device_seconds,
            held=row.held,
        )
        for row in session.scalars(select(ProjectRow))
    )


def charge(session: Session, project_id: str, *, seconds: float) -> None:
    """Add device-seconds (or, negative, give some back) to a project's decayed usage."""
    elapsed = func.extract("epoch", func.now() - ProjectRow.usage_at)
    kept = ProjectRow.usage * func.power(0.5, elapsed / HALF_LIFE_SECONDS)
    session.execute(
        update(ProjectRow)
        .where(ProjectRow.id == project_id)
        .values(usage=func.greatest(0.0, kept + seconds), usage_at=func.now())
    )


def explain(session: Session, job_id: str, *, pool_name: str) -> Verdict | None:
    """Why a queued job waits; None when the next pull would start it, or when it does not wait."""
    return make_plan(snapshot(session, pool_name=pool_name)).verdicts.get(job_id)
