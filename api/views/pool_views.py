"""Views of the pool, its projects and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import Field

from api.views import preemption_views
from api.views.preemption_views import PoolPreemption
from api.views.view import View, maybe_seconds, seconds
from shared.fleet import members as gangs
from shared.operating.overview import Overview, ProjectStanding, Waiting
from shared.plan.preemption import RunningJob
from shared.plan.scheduling import Policy
from shared.store.tables import ApiKeyRow, DeviceRow, KeySecretRow, WorkerRow
from shared.tenants.keys import Caller


class DeviceView(View):
    """A GPU, or the CPU as one device, as its worker last reported it."""

    id: str
    worker_id: str
    host: str
    kind: str = Field(examples=["cuda"])
    name: str
    total_bytes: int
    free_bytes: int
    foreign_bytes: int = Field(description="Held by processes that are not ours.")
    healthy: bool
    ailment: str | None = Field(description="Why it is not healthy.")
    quarantined: bool
    bfloat16: bool = Field(description="It has arithmetic of bfloat16; otherwise that is emulated or refused.")
    capability: str | None = Field(description="NVIDIA's compute capability.", examples=["8.0"])
    probed: str | None = Field(description="What the trainer's own program found there before the first job.")
    cached_models: list[str]
    warm_base: str | None = Field(
        description="The base model that waits in memory there: of devices that are alike, a job gets one with its."
    )
    leased: bool
    job_id: str | None = Field(description="The job that runs there, where the caller may know it.")
    sharing: int = Field(default=0, description="Further jobs that train together with it.")
    project_id: str | None = Field(description="The project of that job, where the caller may know it.")


class SeatView(View):
    """A host of a job that runs on several."""

    job_id: str | None = Field(description="The job, where the caller may know it.")
    node: int = Field(description="0 leads: it holds the lease, and publishes.")
    worker_id: str
    host: str
    devices: list[str]
    phase: str = Field(examples=["training"], description="How far this host is.")


class WorkerIsolation(View):
    """What the host of a worker keeps programs on strangers' data from (docs/security.md)."""

    user: str = Field(description="slot: a user for each program at work; shared: one for all; own: the worker's.")
    network: str = Field(description="Of a program that works alone; namespace, filter, or open: the host's.")
    ranks_network: str = Field(description="Of the ranks of one host; open: they have the host's network.")
    files: str = Field(description="What keeps the host's files from them: user, rules (Landlock), or open: nothing.")
    calls: bool = Field(description="Whether system calls that a training has no use for are refused.")


class Worker(View):
    object: Literal["tunepool.worker"] = "tunepool.worker"
    id: str
    host: str
    pool: str
    version: str
    draining: bool
    started_at: int
    last_seen: int
    isolation: WorkerIsolation | None = Field(description="null: a worker of an older version.")
    libraries: dict[str, str] | None = Field(
        description="Versions of what its trainers run on; null: a worker of an older version.",
        examples=[{"torch": "2.13.0"}],
    )


class PoolPolicy(View):
    max_wait_seconds: float
    min_runtime_seconds: float
    preempt_grace_seconds: float
    half_life_seconds: float
    foreign_tolerance_bytes: int


class QueuePlace(View):
    """A queued job in the pool's order."""

    position: int | None = Field(description="null: the next pull starts it.")
    job_id: str | None = Field(description="null: another project's.")
    project_id: str | None
    tier: str
    gpus: int
    nodes: int
    blocked_by: str | None
    detail: str | None
    eta_low: int | None
    eta_high: int | None


class ProjectUsage(View):
    share: float = Field(description="Decayed device-seconds divided by the weight: the smaller, the sooner.")
    decayed_device_seconds: float
    month_gpu_hours: float = Field(description="Of the calendar month (UTC); what runs counts what it was charged.")
    reserved_gpu_hours: float = Field(
        default=0.0,
        description="Of these hours: charged to what runs and not used yet. What is left comes back.",
    )
    running_devices: int
    queued_jobs: int


class Project(View):
    object: Literal["tunepool.project"] = "tunepool.project"
    id: str
    organization_id: str
    name: str
    weight: float
    guarantee: int
    max_running: int | None
    max_queued: int | None
    max_bytes: int | None
    max_files: int | None
    budget_gpu_hours: float | None
    budget_soft_gpu_hours: float | None
    held: bool
    created_at: int
    usage: ProjectUsage


class ProjectPage(View):
    object: Literal["list"] = "list"
    data: list[Project]


class JobCounts(View):
    """Jobs of all projects that have not ended."""

    validating_files: int = 0
    queued: int = 0
    running: int = 0
    paused: int = 0


class Pool(View):
    object: Literal["tunepool.pool"] = "tunepool.pool"
    name: str
    held: bool
    policy: PoolPolicy
    workers: list[Worker]
    devices: list[DeviceView]
    gangs: list[SeatView] = Field(description="The hosts of jobs that run on several: job by job, the leader first.")
    projects: list[Project] = Field(description="The caller's own; all of them for an administrator.")
    queue: list[QueuePlace] = Field(description="The first hundred in their order.")
    preemptions: list[PoolPreemption] = Field(
        description="Those under way, then the twenty newest of the last day, the newest first."
    )
    jobs: JobCounts


class WorkerPage(View):
    object: Literal["list"] = "list"
    data: list[Worker]


class FormerSecret(View):
    prefix: str
    expires_at: int
    last_used_at: int | None = Field(description="Somebody has not taken the new one yet, when it is recent.")


class Key(View):
    object: Literal["tunepool.key"] = "tunepool.key"
    id: str
    project_id: str
    name: str
    prefix: str
    scopes: list[str]
    max_running: int | None
    max_queued: int | None
    max_tier: str
    max_priority: int
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None = Field(description="Of its present secret, up to five minutes old; null: never.")
    rotated_at: int | None
    former: list[FormerSecret] = Field(description="Former secrets that are still valid, the youngest first.")


class NewKey(Key):
    api_key: str = Field(description="The secret. Nothing can show it again.")


class KeyPage(View):
    object: Literal["list"] = "list"
    data: list[Key]


class Cancelled(View):
    object: Literal["tunepool.cancelled"] = "tunepool.cancelled"
    cancelled: list[str] = Field(description="Jobs that waited and are cancelled.")
    asked_to_stop: list[str] = Field(description="Jobs that ran: their trainers are being stopped.")


# ---- rows become views


def pool(overview: Overview, *, caller: Caller) -> Pool:
    """The pool as this caller may see it: jobs and projects of others stay unnamed without `admin`."""
    return Pool(
        name=overview.name,
        held=overview.policy.held,
        policy=policy(overview.policy),
        workers=[worker(row) for row in overview.workers],
        devices=[_device(row, overview.running.get(row.leased_by or ""), caller) for row in overview.devices],
        gangs=[_seat(seat, overview.running.get(seat.job_id), caller) for seat in overview.seats],
        projects=[project(standing) for standing in overview.standings if _may_see(standing.project.id, caller)],
        queue=[_place(waiting, caller) for waiting in overview.queue],
        preemptions=preemption_views.preemptions(overview, caller=caller),
        jobs=JobCounts.model_validate(dict(overview.counts)),
    )


def _may_see(project_id: str, caller: Caller) -> bool:
    return caller.operates or project_id == caller.project_id


def policy(rules: Policy) -> PoolPolicy:
    return PoolPolicy(
        max_wait_seconds=rules.max_wait.total_seconds(),
        min_runtime_seconds=rules.min_runtime.total_seconds(),
        preempt_grace_seconds=rules.preempt_grace.total_seconds(),
        half_life_seconds=rules.half_life.total_seconds(),
        foreign_tolerance_bytes=rules.foreign_tolerance_bytes,
    )


def _device(row: DeviceRow, job: RunningJob | None, caller: Caller) -> DeviceView:
    seen = job is not None and _may_see(job.project, caller)
    return DeviceView(
        id=row.id,
        worker_id=row.worker_id,
        host=row.host,
        kind=row.kind,
        name=row.name,
        total_bytes=row.total_bytes,
        free_bytes=row.free_bytes,
        foreign_bytes=row.foreign_bytes,
        healthy=row.healthy,
        ailment=row.ailment,
        quarantined=row.quarantined,
        bfloat16=row.bfloat16,
        capability=None if row.capability is None else f"{row.capability // 10}.{row.capability % 10}",
        probed=row.probed,
        cached_models=row.cached_models,
        warm_base=row.warm_base,
        leased=row.leased_by is not None,
        job_id=job.id if job is not None and seen else None,
        project_id=job.project if job is not None and seen else None,
        sharing=0 if job is None else len(job.companions),
    )


def _seat(seat: gangs.Seat, job: RunningJob | None, caller: Caller) -> SeatView:
    seen = job is not None and _may_see(job.project, caller)
    return SeatView(
        job_id=seat.job_id if seen else None,
        node=seat.node,
        worker_id=seat.worker_id,
        host=seat.host,
        devices=list(seat.device_ids),
        phase=seat.phase,
    )


def device(row: DeviceRow) -> DeviceView:
    """For an administrator who has just changed it."""
    return _device(row, None, caller=_NOBODY)


_NOBODY: Final = Caller("", "", "", "", frozenset())


def _place(waiting: Waiting, caller: Caller) -> QueuePlace:
    job, verdict, seen = waiting.job, waiting.verdict, _may_see(waiting.job.project, caller)
    return QueuePlace(
        position=None if verdict is None else verdict.position,
        job_id=job.id if seen else None,
        project_id=job.project if seen else None,
        tier=job.tier,
        gpus=job.gpus,
        nodes=job.nodes,
        blocked_by=None if verdict is None else verdict.blocked_by,
        detail=verdict.detail if verdict is not None and seen else None,
        eta_low=None if verdict is None else maybe_seconds(verdict.eta_low),
        eta_high=None if verdict is None else maybe_seconds(verdict.eta_high),
    )


def worker(row: WorkerRow) -> Worker:
    return Worker(
        id=row.id,
        host=row.host,
        pool=row.pool,
        version=row.version,
        draining=row.draining,
        started_at=seconds(row.started_at),
        last_seen=seconds(row.last_seen),
        isolation=None if row.isolation is None else WorkerIsolation.model_validate(row.isolation),
        libraries=row.libraries,
    )


def project(standing: ProjectStanding) -> Project:
    row = standing.project
    return Project(
        id=row.id,
        organization_id=row.organization_id,
        name=row.name,
        weight=row.weight,
        guarantee=row.guarantee,
        max_running=row.max_running,
        max_queued=row.max_queued,
        max_bytes=row.max_bytes,
        max_files=row.max_files,
        budget_gpu_hours=_hours(row.budget_device_seconds),
        budget_soft_gpu_hours=_hours(row.budget_soft_device_seconds),
        held=row.held,
        created_at=seconds(row.created_at),
        usage=ProjectUsage(
            share=round(standing.share.usage / row.weight, 3),
            decayed_device_seconds=round(standing.share.usage, 3),
            month_gpu_hours=round(standing.month_seconds / 3600, 4),
            reserved_gpu_hours=round(standing.reserved_seconds / 3600, 4),
            running_devices=standing.running_devices,
            queued_jobs=standing.queued,
        ),
    )


def _hours(device_seconds: float | None) -> float | None:
    return None if device_seconds is None else device_seconds / 3600


def key(row: ApiKeyRow, former: Sequence[KeySecretRow] = ()) -> Key:
    return Key(**_key(row, former))


def new_key(row: ApiKeyRow, secret: str, former: Sequence[KeySecretRow] = ()) -> NewKey:
    return NewKey(**_key(row, former), api_key=secret)


def _former(row: KeySecretRow) -> FormerSecret:
    return FormerSecret(
        prefix=row.prefix, expires_at=seconds(row.expires_at), last_used_at=maybe_seconds(row.last_used_at)
    )


def _key(row: ApiKeyRow, former: Sequence[KeySecretRow]) -> dict[str, Any]:
    return {
        "id": row.id,
        "project_id": row.project_id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        "max_running": row.max_running,
        "max_queued": row.max_queued,
        "max_tier": row.max_tier,
        "max_priority": row.max_priority,
        "created_at": seconds(row.created_at),
        "expires_at": maybe_seconds(row.expires_at),
        "revoked_at": maybe_seconds(row.revoked_at),
        "last_used_at": maybe_seconds(row.last_used_at),
        "rotated_at": maybe_seconds(row.rotated_at),
        "former": [_former(secret) for secret in former],
    }
