"""Sweeps, and their trials: which values each takes, its job, and how it did."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class SweepRow(Base):
    """One job in many settings. The janitor moves it on, under a lock of its row."""

    __tablename__ = "sweeps"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    idempotency_key: Mapped[str | None] = mapped_column(Text)
    request_sha256: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, default="running", server_default=text("'running'"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    # What the trials stand on, as it was when they were asked for: the catalogue and an alias may move meanwhile.
    base: Mapped[dict[str, Any]] = mapped_column(Json)
    parent_name: Mapped[str | None] = mapped_column(Text)
    traceparent: Mapped[str | None] = mapped_column(Text)  # of the request's span; its trials' jobs remember it too
    closed: Mapped[str | None] = mapped_column(Text)  # why nothing is started any more
    detail: Mapped[str | None] = mapped_column(Text)  # why the next trial waits, or what the sweep waits for
    best: Mapped[int | None] = mapped_column(Integer)  # number of a trial
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('running','paused','succeeded','failed','cancelled')", name="status"),
        CheckConstraint(
            "(status in ('succeeded','failed','cancelled')) = (finished_at is not null)", name="end_has_moment"
        ),
        Index("ix_sweeps_project_id_id", "project_id", "id"),
        Index("ix_sweeps_running", "id", postgresql_where=text("status = 'running'")),
        Index(
            "uq_sweeps_idempotency_key",
            "key_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key is not null"),
        ),
    )


class TrialRow(Base):
    """One setting of a sweep. Its job is made in the transaction that names it here, so there is never a second one."""

    __tablename__ = "sweep_trials"

    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    settings: Mapped[dict[str, Any]] = mapped_column(Json)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[str] = mapped_column(Text, default="planned", server_default=text("'planned'"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)
    rung: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # how many it has passed
    parked: Mapped[int | None] = mapped_column(Integer)  # the rung that it waits at, or waited: paused by its sweep
    seen: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))  # events of its job
    looks: Mapped[list[list[Any]]] = mapped_column(Json, default=list, server_default=text("'[]'::jsonb"))
    value: Mapped[float | None]  # by which the sweep chooses
    reason: Mapped[str | None] = mapped_column(Text)  # what the sweep has decided of it
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)  # of one whose job was refused

    __table_args__ = (
        CheckConstraint("state in ('planned','started','succeeded','failed','cancelled','stopped')", name="state"),
        CheckConstraint("(state = 'started') <= (job_id is not null)", name="started_has_job"),
    )
