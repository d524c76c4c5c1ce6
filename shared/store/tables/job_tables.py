"""Jobs, their attempts and further hosts, and what is known of a job while it runs and afterwards."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Leased, Moment


class JobRow(Leased, Base):
    """One user request. `status` is written by shared/jobs alone, always guarded by status and fence."""

    __tablename__ = "jobs"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    status: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    # The tuned model that it goes on from, by the id of its row, and its name then.
    parent_id: Mapped[str | None] = mapped_column(Text)
    parent_name: Mapped[str | None] = mapped_column(Text)
    suffix: Mapped[str | None] = mapped_column(Text)
    superseded_by: Mapped[str | None] = mapped_column(Text)  # a newer job of its group
    seed: Mapped[int] = mapped_column(Integer)
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    request_sha256: Mapped[str] = mapped_column(Text)
    spec: Mapped[dict[str, Any] | None] = mapped_column(Json)
    auto: Mapped[list[dict[str, Any]]] = mapped_column(Json, server_default=text("'[]'::jsonb"))
    job_metadata: Mapped[dict[str, str] | None] = mapped_column("metadata", Json)
    traceparent: Mapped[str | None] = mapped_column(Text)  # W3C's, of the span of the request that made it

    tier: Mapped[str] = mapped_column(Text, default="normal", server_default=text("'normal'"))
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    preemptible: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    gpus: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    nodes: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    bytes_per_device: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    needs_gpu: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    needs_bfloat16: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    needs_capability: Mapped[int | None] = mapped_column()  # NVIDIA's compute capability at least: 80 is 8.0
    settled_for: Mapped[dict[str, Any] | None] = mapped_column(Json)  # the device that the pool offered then
    max_runtime_seconds: Mapped[int | None] = mapped_column(Integer)
    expected_seconds: Mapped[float | None]
    # What a job must have in common with it to share its device, in words; null: it trains alone. And the bytes of its
    # estimate that jobs on one base hold once.
    cotraining_ground: Mapped[str | None] = mapped_column(Text)
    base_bytes: Mapped[int | None] = mapped_column(BigInteger)
    group_name: Mapped[str | None] = mapped_column(Text)
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    not_before: Mapped[datetime | None] = mapped_column(Moment)
    first_eta_low: Mapped[datetime | None] = mapped_column(Moment)  # the first forecast, to measure the drift of later
    first_eta_high: Mapped[datetime | None] = mapped_column(Moment)

    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    micro_batch_size: Mapped[int | None] = mapped_column(Integer)
    pass_tokens: Mapped[int | None] = mapped_column(Integer)
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
        Index("ix_jobs_parent_id", "parent_id", postgresql_where=text("parent_id is not null")),
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


class JobLabelRow(Base):
    """A pair of a job's metadata, in the order of lists. A trigger writes it with the job; nothing changes it later."""

    __tablename__ = "job_labels"

    project_id: Mapped[str] = mapped_column(Text, primary_key=True)
    label: Mapped[UUID] = mapped_column(Uuid, primary_key=True)  # the function metadata_label of key and value
    job_id: Mapped[str] = mapped_column(Text, primary_key=True)


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
    first_tokens: Mapped[int | None] = mapped_column(BigInteger)
    last_tokens: Mapped[int | None] = mapped_column(BigInteger)
    # Of a job on several hosts: where they meet, and since when its leader needs the members no more.
    meeting: Mapped[dict[str, Any] | None] = mapped_column(Json)
    dismissed_at: Mapped[datetime | None] = mapped_column(Moment)
    cluster: Mapped[dict[str, Any] | None] = mapped_column(Json)  # what the cluster calls it, and says of it
    log: Mapped[dict[str, Any] | None] = mapped_column(Json)  # a StoredLog, once the store has it
    together: Mapped[int | None] = mapped_column(Integer)  # how many jobs shared the device at its start; null: one
    device_share: Mapped[float | None]  # of the time that it had the device with others; null: all of it

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


class LogPieceRow(Base):
    """Lines of an attempt's log, until the store has the whole of it. `start` counts bytes of the log from 0."""

    __tablename__ = "log_pieces"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    text: Mapped[str] = mapped_column(Text)


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
