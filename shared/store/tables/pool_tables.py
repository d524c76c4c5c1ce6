"""The pool, its workers and their devices."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


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
    isolation: Mapped[dict[str, Any] | None] = mapped_column(Json)
    trackers: Mapped[list[str] | None] = mapped_column(Json)  # those it can feed; null: an older version
    libraries: Mapped[dict[str, str] | None] = mapped_column(Json)  # of its trainers, by name; null: an older version


class PoolRow(Base):
    """What an administrator has set for a pool; a pool without a row follows the defaults of `Policy`."""

    __tablename__ = "pools"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    max_wait_seconds: Mapped[float | None]
    min_runtime_seconds: Mapped[float | None]
    preempt_grace_seconds: Mapped[float | None]


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
    capability: Mapped[int | None] = mapped_column()  # NVIDIA's compute capability: 80 is 8.0
    probed: Mapped[str | None] = mapped_column(Text)  # what the trainer's own program found there
    readings: Mapped[dict[str, float] | None] = mapped_column(Json)  # of a GPU: utilization, watts, celsius
    cached_models: Mapped[list[str]] = mapped_column(Json, server_default=text("'[]'::jsonb"))
    warm_base: Mapped[str | None] = mapped_column(Text)  # the base model that waits in memory for its next job
    leased_by: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        CheckConstraint("(leased_by is null) = (fence is null)", name="lease_has_fence"),
        Index("ix_devices_leased_by", "leased_by", postgresql_where=text("leased_by is not null")),
    )


class PlaygroundRow(Base):
    """A process that answers questions to models, as it last reported itself. Who knows the token may ask it."""

    __tablename__ = "playgrounds"

    id: Mapped[str] = mapped_column(Text, primary_key=True)  # its host's and home's, so a restart is the same one
    host: Mapped[str] = mapped_column(Text)
    pool: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(Text)
    port: Mapped[int] = mapped_column(Integer)
    token: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str | None] = mapped_column(Text)  # what it holds, or loads
    adapters: Mapped[list[str]] = mapped_column(Json, server_default=text("'[]'::jsonb"))  # ids
    asked: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # questions without an end
    started_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    last_seen: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (CheckConstraint("state in ('cold','warming','warm','yielding')", name="state"),)
