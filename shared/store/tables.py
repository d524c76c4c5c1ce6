"""All rows. Only verbs in `shared` touch them; doors never do."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base

Moment = DateTime(timezone=True)
Json = JSONB(none_as_null=True)


class OrganizationRow(Base):
    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())


class ProjectRow(Base):
    """A tenant: it owns files, jobs, adapters and keys, and has a share of the pool."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(Text)
    weight: Mapped[float] = mapped_column(default=1.0, server_default=text("1"))
    guarantee: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    max_running: Mapped[int | None] = mapped_column(Integer)
    max_queued: Mapped[int | None] = mapped_column(Integer)
    budget_device_seconds: Mapped[float | None]  # a calendar month's hard limit (UTC)
    budget_soft_device_seconds: Mapped[float | None]  # beyond it the project is warned
    usage: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    usage_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (UniqueConstraint("organization_id", "name"),)


class ApiKeyRow(Base):
    """A bearer key: the secret itself is never stored, only its SHA-256."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(Text, unique=True)
    scopes: Mapped[list[str]] = mapped_column(Json)
    max_running: Mapped[int | None] = mapped_column(Integer)
    max_queued: Mapped[int | None] = mapped_column(Integer)
    max_tier: Mapped[str] = mapped_column(Text, default="interactive", server_default=text("'interactive'"))
    max_priority: Mapped[int] = mapped_column(Integer, default=100, server_default=text("100"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Moment)
    revoked_at: Mapped[datetime | None] = mapped_column(Moment)
    last_used_at: Mapped[datetime | None] = mapped_column(Moment)


class Leased:
    """The columns of a lease, for every row that workers work on. shared/lease has the verbs."""

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    fence: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    failures: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(Moment)


class FileRow(Leased, Base):
    """An uploaded file, or one that a job made. The row is made when the bytes are complete in the store."""

    __tablename__ = "files"

    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    # Parquet and CSV: the JSONL rows that the check made of them, which is what jobs read.
    rows_key: Mapped[str | None] = mapped_column(Text)
    rows_sha256: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    status_details: Mapped[str | None] = mapped_column(Text)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    # The columns keep the names that the version before this one writes: versions run side by side.
    fence: Mapped[int] = mapped_column("check_attempts", Integer, default=0, server_default=text("0"))
    lease_until: Mapped[datetime | None] = mapped_column("check_until", Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Moment)
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('uploaded','processed','error')", name="status"),
        Index("ix_files_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_files_unchecked", "id", postgresql_where=text("status = 'uploaded' and deleted_at is null")),
    )


class JobRow(Leased, Base):
    """One user request. `status` is written by shared/jobs alone, always guarded by status and fence."""

    __tablename__ = "jobs"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    status: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    suffix: Mapped[str | None] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(Integer)
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    request_sha256: Mapped[str] = mapped_column(Text)
    spec: Mapped[dict[str, Any] | None] = mapped_column(Json)
    auto: Mapped[list[dict[str, Any]]] = mapped_column(Json, server_default=text("'[]'::jsonb"))
    job_metadata: Mapped[dict[str, str] | None] = mapped_column("metadata", Json)

    tier: Mapped[str] = mapped_column(Text, default="normal", server_default=text("'normal'"))
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    preemptible: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    gpus: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    nodes: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    bytes_per_device: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    max_runtime_seconds: Mapped[int | None] = mapped_column(Integer)
    expected_seconds: Mapped[float | None]
    group_name: Mapped[str | None] = mapped_column(Text)
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    not_before: Mapped[datetime | None] = mapped_column(Moment)
    first_eta_low: Mapped[datetime | None] = mapped_column(Moment)  # the first forecast, to measure the drift of later
    first_eta_high: Mapped[datetime | None] = mapped_column(Moment)

    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    micro_batch_size: Mapped[int | None] = mapped_column(Integer)
    gradient_checkpointing: Mapped[bool | None]
    cancel_requested_at: Mapped[datetime | None] = mapped_column(Moment)
    pause_requested_at: Mapped[datetime | None] = mapped_column(Moment)
    preempt_requested_at: Mapped[datetime | None] = mapped_column(Moment)
    last_checkpoint: Mapped[dict[str, Any] | None] = mapped_column(Json)
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)

    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    fine_tuned_model: Mapped[str | None] = mapped_column(Text)
    manifest: Mapped[dict[str, Any] | None] = mapped_column(Json)
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish: Mapped[datetime | None] = mapped_column(Moment)
    device_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    charged_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    backfill: Mapped[bool] = mapped_column(default=False, server_default=text("false"))

    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    queued_at: Mapped[datetime | None] = mapped_column(Moment)
    started_at: Mapped[datetime | None] = mapped_column(Moment)
    finished_at: Mapped[datetime | None] = mapped_column(Moment)
    version: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))

    __table_args__ = (
        CheckConstraint(
            "status in ('validating_files','queued','running','paused','succeeded','failed','cancelled')", name="status"
        ),
        # I9: a running job always has a lease, and a settled or waiting one never has.
        CheckConstraint("(status = 'running') <= (lease_until is not null)", name="running_has_lease"),
        CheckConstraint(
            "(status in ('queued','paused','succeeded','failed','cancelled')) <= (lease_until is null)",
            name="idle_has_no_lease",
        ),
        CheckConstraint("(status = 'succeeded') <= (manifest is not null)", name="success_has_manifest"),
        Index("ix_jobs_project_id_id", "project_id", "id"),
        Index("ix_jobs_queued", "id", postgresql_where=text("status = 'queued'")),
        Index("ix_jobs_validating", "id", postgresql_where=text("status = 'validating_files'")),
        Index("ix_jobs_leased", "lease_until", postgresql_where=text("lease_until is not null")),
        Index("ix_jobs_metadata", "metadata", postgresql_using="gin", postgresql_ops={"metadata": "jsonb_path_ops"}),
        Index("ix_jobs_without_metadata", "project_id", "id", postgresql_where=text("metadata is null")),
        Index("ix_jobs_key_id_request_sha256", "key_id", "request_sha256"),
        Index("ix_jobs_measured", "base_model", "finished_at", postgresql_where=text("status = 'succeeded'")),
        # Few among the many that have ended. Postgres uses it for a query that names its statuses, not for a `not in`.
        Index(
            "ix_jobs_unfinished",
            "project_id",
            "id",
            postgresql_where=text("status in ('validating_files','queued','running','paused')"),
        ),
        Index("ix_jobs_group", "project_id", "group_name", postgresql_where=text("status = 'queued'")),
        {"postgresql_with": {"fillfactor": "80"}},
    )


class AttemptRow(Base):
    """One execution of a job. At most one per job has no end."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    fence: Mapped[int] = mapped_column(BigInteger)
    worker_id: Mapped[str] = mapped_column(Text)
    device_ids: Mapped[list[str]] = mapped_column(Json)
    phase: Mapped[str] = mapped_column(Text)
    micro_batch_size: Mapped[int | None] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    ended_at: Mapped[datetime | None] = mapped_column(Moment)
    outcome: Mapped[str | None] = mapped_column(Text)
    exit_code: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    peak_bytes: Mapped[int | None] = mapped_column(BigInteger)
    first_step: Mapped[int | None] = mapped_column(Integer)
    last_step: Mapped[int | None] = mapped_column(Integer)
    # Of a job on several hosts: where they meet, and since when its leader needs the members no more.
    meeting: Mapped[dict[str, Any] | None] = mapped_column(Json)
    dismissed_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        Index("uq_attempts_open", "job_id", unique=True, postgresql_where=text("ended_at is null")),
        Index("ix_attempts_ended_at", "ended_at"),
    )


class MemberRow(Base):
    """A further host of an attempt, and how far it says it is. The leader is node 0: it has the lease, and no row."""

    __tablename__ = "members"

    job_id: Mapped[str] = mapped_column(Text, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    node: Mapped[int] = mapped_column(Integer, primary_key=True)
    worker_id: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    device_ids: Mapped[list[str]] = mapped_column(Json)
    phase: Mapped[str] = mapped_column(Text, default="called", server_default=text("'called'"))
    leaving: Mapped[bool] = mapped_column(default=False, server_default=text("false"))  # its worker shuts down
    heard_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    exit_code: Mapped[int | None] = mapped_column(Integer)  # of ranks that ended by themselves
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)

    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["attempts.job_id", "attempts.number"]),
        CheckConstraint("phase in ('called','staging','ready','training','ended')", name="phase"),
        Index("ix_members_worker_id", "worker_id", postgresql_where=text("phase <> 'ended'")),
    )


class EventRow(Base):
    """What a client sees of a job, in order. `seq` has no gaps within a job."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    level: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(Json)


class CheckpointRow(Base):
    """A published checkpoint: its files lie in the store under the fence that wrote them."""

    __tablename__ = "checkpoints"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(Integer)
    name: Mapped[str] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    manifest: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (UniqueConstraint("job_id", "step"), Index("ix_checkpoints_name", "name"))


class AdapterRow(Base):
    """The product of a job, known by its `ft:` name."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text, unique=True)
    base_model: Mapped[str] = mapped_column(Text)
    manifest: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        Index("ix_adapters_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
    )


class MergeRow(Leased, Base):
    """A product made of adapters without training: a merged model directory, or a weighted combination."""

    __tablename__ = "merges"

    kind: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    base_model: Mapped[str] = mapped_column(Text)
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    manifest: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("kind in ('merge','combination')", name="kind"),
        CheckConstraint("status in ('queued','running','succeeded','failed')", name="status"),
        CheckConstraint("(status = 'succeeded') = (manifest is not null)", name="success_has_manifest"),
        CheckConstraint("(status in ('succeeded','failed')) = (finished_at is not null)", name="end_has_moment"),
        Index("ix_merges_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
        Index(
            "ix_merges_unfinished",
            "id",
            postgresql_where=text("status in ('queued','running') and deleted_at is null"),
        ),
    )


class WorkerRow(Base):
    """A worker process group on a host, as it last reported itself."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    host: Mapped[str] = mapped_column(Text)
    pool: Mapped[str] = mapped_column(Text)
    boot_id: Mapped[str] = mapped_column(Text)
    started_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    last_seen: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    draining: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    version: Mapped[str] = mapped_column(Text)


class PoolRow(Base):
    """What an administrator has set for a pool; a pool without a row follows the defaults of `Policy`."""

    __tablename__ = "pools"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    max_wait_seconds: Mapped[float | None]
    min_runtime_seconds: Mapped[float | None]
    preempt_grace_seconds: Mapped[float | None]


class AuditRow(Base):
    """One act of operation: who did what to what, and how it stood before and after. Only ever inserted."""

    __tablename__ = "audit"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    action: Mapped[str] = mapped_column(Text)
    target: Mapped[str] = mapped_column(Text)
    before: Mapped[dict[str, Any] | None] = mapped_column(Json)
    after: Mapped[dict[str, Any] | None] = mapped_column(Json)

    __table_args__ = (Index("ix_audit_target", "target", "id"),)


class DeviceRow(Base):
    """A GPU, or the CPU as one device. Leased exactly while `leased_by` names a job."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    worker_id: Mapped[str] = mapped_column(ForeignKey("workers.id"))
    host: Mapped[str] = mapped_column(Text)
    pool: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    free_bytes: Mapped[int] = mapped_column(BigInteger)
    foreign_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    healthy: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    ailment: Mapped[str | None] = mapped_column(Text)  # why it is not healthy, as its worker says
    quarantined: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    bfloat16: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    cached_models: Mapped[list[str]] = mapped_column(Json, server_default=text("'[]'::jsonb"))
    leased_by: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        CheckConstraint("(leased_by is null) = (fence is null)", name="lease_has_fence"),
        Index("ix_devices_leased_by", "leased_by", postgresql_where=text("leased_by is not null")),
    )


class PreflightRow(Leased, Base):
    """A question about a job that is not submitted."""

    __tablename__ = "preflights"

    status: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(Integer)
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    # The columns keep the names that the version before this one writes: versions run side by side.
    fence: Mapped[int] = mapped_column("checker", Integer, default=0, server_default=text("0"))
    lease_until: Mapped[datetime | None] = mapped_column("check_until", Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('queued','running','succeeded','failed')", name="status"),
        Index("ix_preflights_project_id_id", "project_id", "id"),
        Index("ix_preflights_waiting", "id", postgresql_where=text("status in ('queued','running')")),
    )


class BaseModelRow(Leased, Base):
    """A hub's repository at a revision, and what a worker found there. A row that is ready never changes."""

    __tablename__ = "base_models"

    project_id: Mapped[str] = mapped_column(Text, default="", server_default=text("''"))  # the installation's
    name: Mapped[str] = mapped_column(Text)  # the catalogue's entry that asked first
    source: Mapped[str] = mapped_column(Text)
    locator: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(Text)  # as asked: a branch, a tag or a commit
    commit: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    config: Mapped[str | None] = mapped_column(Text)  # config.json as published; facts are reckoned when it is read
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (CheckConstraint("state in ('resolving','ready','error')", name="state"),)


class MeasurementRow(Base):
    """What a finished attempt really took, beside what was predicted: it calibrates the next estimates."""

    __tablename__ = "measurements"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    base_model: Mapped[str] = mapped_column(Text)
    method: Mapped[str] = mapped_column(Text)
    device_kind: Mapped[str] = mapped_column(Text)
    device_name: Mapped[str] = mapped_column(Text)
    pass_tokens: Mapped[int] = mapped_column(BigInteger)
    predicted_bytes: Mapped[int] = mapped_column(BigInteger)
    measured_bytes: Mapped[int] = mapped_column(BigInteger)
    trained_tokens: Mapped[int] = mapped_column(BigInteger)
    train_seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (Index("ix_measurements_kind", "base_model", "method", "device_kind", "created_at"),)


class IdempotencyRow(Base):
    """A caller's Idempotency-Key and the job it made; written in the job's own transaction."""

    __tablename__ = "idempotency_keys"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(Text, primary_key=True)
    request_sha256: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
