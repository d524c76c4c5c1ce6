"""Reads the pool for the plan: the queue, the running jobs, the devices and the shares.

Only `charge` and `keep_first_etas` write; shared/jobs writes the decisions of a plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import func, or_, select, true, update
from sqlalchemy.orm import Session

from shared.contract.documents import JobProgress
from shared.fleet.workers import SILENCE
from shared.plan.capacity import Device
from shared.plan.companions import CommonGround
from shared.plan.fairshare import charge as entry_charge
from shared.plan.preemption import RunningJob
from shared.plan.scheduling import Fetching, Plan, Policy, QueuedJob, Share, decayed, plan
from shared.store.tables import ApiKeyRow, AttemptRow, DeviceRow, FetchRow, JobRow, PoolRow, ProjectRow, WorkerRow
from shared.tenants import usage

DEFAULTS: Final = Policy()
HALF_LIFE_SECONDS: Final = DEFAULTS.half_life.total_seconds()
# First forecasts written by one pass: wording a verdict costs some, and the next pass takes the rest.
FIRST_ETAS_PER_PASS: Final = 200


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent look at a pool, in the plan's own terms."""

    now: datetime
    queue: tuple[QueuedJob, ...]
    running: tuple[RunningJob, ...]
    devices: tuple[Device, ...]
    shares: tuple[Share, ...]
    policy: Policy = DEFAULTS
    fetches: Mapping[str, Fetching] = field(default_factory=dict)

    def without(self, job_ids: Collection[str]) -> Snapshot:
        """The same without these waiting jobs."""
        return replace(self, queue=tuple(job for job in self.queue if job.id not in job_ids)) if job_ids else self

    def charge(self, job_id: str) -> float:
        """Device-seconds that the job's project pays on entry."""
        return next((entry_charge(job, policy=self.policy) for job in self.queue if job.id == job_id), 0.0)


def snapshot(session: Session, *, pool_name: str) -> Snapshot:
    """Read the pool. Every job may run in every pool of this installation that has its devices."""
    now: datetime = session.scalars(select(func.now())).one()
    return Snapshot(
        now=now,
        queue=_queue(session),
        running=_running(session, now),
        devices=devices(session, pool_name),
        shares=_shares(session, now),
        policy=policy(session, pool_name),
        fetches=_fetches(session, pool_name),
    )


def policy(session: Session, pool_name: str) -> Policy:
    """The pool's rules as they are set now."""
    row = session.get(PoolRow, pool_name, populate_existing=True)
    if row is None:
        return DEFAULTS
    return Policy(
        held=row.held,
        max_wait=_or_default(row.max_wait_seconds, DEFAULTS.max_wait),
        min_runtime=_or_default(row.min_runtime_seconds, DEFAULTS.min_runtime),
        preempt_grace=_or_default(row.preempt_grace_seconds, DEFAULTS.preempt_grace),
    )


def _or_default(seconds: float | None, default: timedelta) -> timedelta:
    return default if seconds is None else timedelta(seconds=seconds)


def make_plan(view: Snapshot) -> Plan:
    return plan(
        view.queue, view.running, view.devices, view.shares, policy=view.policy, now=view.now, fetches=view.fetches
    )


# Field of QueuedJob -> the column it is read from. By name: two columns of one type cannot be swapped in silence.
_QUEUED: Final = {
    "id": JobRow.id,
    "project": JobRow.project_id,
    "key": JobRow.key_id,
    "submitted_at": JobRow.created_at,
    "tier": JobRow.tier,
    "priority": JobRow.priority,
    "gpus": JobRow.gpus,
    "nodes": JobRow.nodes,
    "bytes_per_device": JobRow.bytes_per_device,
    "max_runtime_seconds": JobRow.max_runtime_seconds,
    # A job that goes on from a checkpoint needs what was left of it, as its last attempt measured.
    "expected_seconds": func.coalesce(JobRow.progress["seconds_left"].as_float(), JobRow.expected_seconds),
    "not_before": JobRow.not_before,
    "preemptible": JobRow.preemptible,
    "held": JobRow.held,
    "base_model": JobRow.base_model,
    "needs_gpu": JobRow.needs_gpu,
    "needs_bfloat16": JobRow.needs_bfloat16,
    "needs_capability": JobRow.needs_capability,
}


def _queue(session: Session) -> tuple[QueuedJob, ...]:
    columns = [_QUEUED[field.name] for field in fields(QueuedJob)]
    rows = session.execute(select(*columns).where(JobRow.status == "queued"))
    return tuple(QueuedJob(*row) for row in rows)  # by position is the fastest, and the line above orders them


def _running(session: Session, now: datetime) -> tuple[RunningJob, ...]:
    rows = session.execute(
        select(JobRow, AttemptRow.device_ids, AttemptRow.started_at, AttemptRow.together)
        .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.ended_at.is_(None)))
        .where(JobRow.status == "running")
    )
    alone, groups = list[RunningJob](), dict[tuple[str, ...], list[RunningJob]]()
    for job, ids, started_at, together in rows:
        running = _running_job(job, tuple(ids), started_at, now=now)
        (alone if together is None else groups.setdefault(running.device_ids, [])).append(running)
    return (*alone, *map(as_one, groups.values()))


def as_one(group: list[RunningJob]) -> RunningJob:
    """Jobs that share a device, as the plan sees them: one job, which holds it for as long as all have left together.

    They are of one tier, and all or none of them may be stopped.
    """
    first, *others = sorted(group, key=lambda job: (job.started_at, job.id))
    left = [job.expected_seconds_left for job in group]
    return replace(
        first,
        priority=max(job.priority for job in group),
        started_at=max(job.started_at for job in group),
        expected_seconds_left=None if None in left else sum(seconds for seconds in left if seconds is not None),
        preempt_requested=all(job.preempt_requested for job in group),
        companions=tuple(job.id for job in others),
    )


def grounds(session: Session, *, like: str) -> dict[str, CommonGround]:
    """What the job `like` shares with others, and the waiting jobs that share the same; empty: it trains alone."""
    wanted = select(JobRow.cotraining_ground).where(JobRow.id == like).scalar_subquery()
    rows = session.execute(
        select(JobRow.id, JobRow.cotraining_ground, JobRow.base_bytes).where(
            or_(JobRow.status == "queued", JobRow.id == like), JobRow.cotraining_ground == wanted
        )
    )
    return {job_id: CommonGround(words, base_bytes or 0) for job_id, words, base_bytes in rows if words is not None}


def _running_job(job: JobRow, device_ids: tuple[str, ...], started_at: datetime, *, now: datetime) -> RunningJob:
    return RunningJob(
        id=job.id,
        project=job.project_id,
        key=job.key_id,
        tier=job.tier,  # type: ignore[arg-type]  # text in the row; the spec keeps it in the set
        priority=job.priority,
        device_ids=device_ids,
        started_at=started_at,
        max_runtime_seconds=job.max_runtime_seconds,
        expected_seconds_left=_seconds_left(job, ran=(now - started_at).total_seconds()),
        preemptible=job.preemptible,
        preempt_requested=job.preempt_requested_at is not None,
        backfill=job.backfill,
    )


def _seconds_left(job: JobRow, *, ran: float) -> float | None:
    """A running job's expected time, as its trainer measures it; before the first step, the forecast."""
    left = JobProgress.left(job.progress)
    if left is not None:
        return left
    return None if job.expected_seconds is None else max(0.0, job.expected_seconds - ran)


def devices(session: Session, pool_name: str, *, silent: bool = False) -> tuple[Device, ...]:
    """The devices of the pool's live workers; `silent`: of all that are known, heard of lately or not."""
    rows = session.execute(
        select(DeviceRow, WorkerRow.draining, WorkerRow.host)
        .join(WorkerRow, WorkerRow.id == DeviceRow.worker_id)
        .where(DeviceRow.pool == pool_name, true() if silent else WorkerRow.last_seen > func.now() - SILENCE)
    )
    return tuple(
        Device(
            id=row.id,
            # Each host's part of a gang belongs to one worker, so where several share a host each counts as a host.
            # A dispatcher has many places in a cluster, and each of them is a host to the plan.
            host=row.worker_id if row.host == host else f"{row.worker_id}/{row.host}",
            total_bytes=row.total_bytes,
            free_bytes=row.free_bytes,
            pool=row.pool,
            kind=row.kind,
            leased_by=row.leased_by,
            healthy=row.healthy and not row.quarantined,
            draining=draining,
            foreign_bytes=row.foreign_bytes,
            cached_models=frozenset(row.cached_models),
            bfloat16=row.bfloat16,
            capability=row.capability,
            of_cluster=row.host != host,
            warm_base=row.warm_base,
        )
        for row, draining, host in rows
    )


def _fetches(session: Session, pool_name: str) -> dict[str, Fetching]:
    """How far each base model is on the host of this pool that is farthest."""
    rows = session.execute(
        select(FetchRow, WorkerRow.host)
        .join(WorkerRow, WorkerRow.id == FetchRow.worker_id)
        .where(FetchRow.state != "done", WorkerRow.pool == pool_name, WorkerRow.last_seen > func.now() - SILENCE)
        # The farthest comes last, and so it stays.
        .order_by(FetchRow.state != "error", FetchRow.bytes_done, FetchRow.id)
    )
    return {
        row.model: Fetching(host, row.bytes_done, row.bytes_total, over=row.state == "error", error=row.error)
        for row, host in rows
    }


def _shares(session: Session, now: datetime) -> tuple[Share, ...]:
    rows = session.scalars(select(ProjectRow)).all()
    spent = usage.this_month(session, [row.id for row in rows if row.budget_device_seconds is not None])
    caps = _key_caps(session)
    return tuple(
        Share(
            project=row.id,
            weight=row.weight,
            usage=decayed(row.usage, elapsed=now - row.usage_at, half_life=DEFAULTS.half_life),
            guarantee=row.guarantee,
            max_running=row.max_running,
            key_max_running=caps.get(row.id, {}),
            budget_left_seconds=_left(row.budget_device_seconds, spent.get(row.id, 0.0)),
            held=row.held,
        )
        for row in rows
    )


def _left(budget: float | None, spent: float) -> float | None:
    return None if budget is None else max(0.0, budget - spent)


def _key_caps(session: Session) -> dict[str, dict[str, int]]:
    caps: dict[str, dict[str, int]] = {}
    capped = select(ApiKeyRow.project_id, ApiKeyRow.id, ApiKeyRow.max_running).where(ApiKeyRow.max_running.is_not(None))
    for project_id, key_id, most in session.execute(capped):
        if most is not None:
            caps.setdefault(project_id, {})[key_id] = most
    return caps


def charge(session: Session, project_id: str, *, seconds: float) -> None:
    """Add device-seconds (or, negative, give some back) to a project's decayed usage."""
    elapsed = func.extract("epoch", func.now() - ProjectRow.usage_at)
    kept = ProjectRow.usage * func.power(0.5, elapsed / HALF_LIFE_SECONDS)
    session.execute(
        update(ProjectRow)
        .where(ProjectRow.id == project_id)
        .values(usage=func.greatest(0.0, kept + seconds), usage_at=func.now())
    )


def keep_first_etas(session: Session, made: Plan) -> None:
    """Note the first forecast of jobs that have none yet, so that each later one can be held against it."""
    new = select(JobRow.id).where(JobRow.status == "queued", JobRow.first_eta_low.is_(None)).order_by(JobRow.id.desc())
    # Skipping rows that somebody else holds: this pass must wait for nobody while it holds the pool's lock.
    for job_id in session.scalars(new.limit(FIRST_ETAS_PER_PASS).with_for_update(skip_locked=True)).all():
        verdict = made.verdicts.get(job_id)
        if verdict is not None and verdict.eta_low is not None:
            session.execute(
                update(JobRow)
                .where(JobRow.id == job_id, JobRow.first_eta_low.is_(None))
                .values(first_eta_low=verdict.eta_low, first_eta_high=verdict.eta_high)
            )
