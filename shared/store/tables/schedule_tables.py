"""Schedules of a project: what starts jobs by the clock or when data changes, and the outcome of each start."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, CheckConstraint, ForeignKey, Index, Integer, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class ScheduleRow(Base):
    """A job that is asked for again and again, with the rights of the key that made the schedule.

    With `cron` it is due at moments of a time zone, else when a file whose name begins with `data_prefix` comes.
    """

    __tablename__ = "schedules"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    name: Mapped[str] = mapped_column(Text)
    cron: Mapped[str | None] = mapped_column(Text)
    time_zone: Mapped[str] = mapped_column(Text)
    data_prefix: Mapped[str | None] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(Json)  # a job's, without its training file where that is the newest
    overlap: Mapped[str] = mapped_column(Text)
    skip_unchanged: Mapped[bool] = mapped_column(Boolean)
    next_at: Mapped[datetime | None] = mapped_column(Moment)  # null: not by the clock, or paused
    seen_file: Mapped[str | None] = mapped_column(Text)  # later ones are changes; ids sort by time
    paused_at: Mapped[datetime | None] = mapped_column(Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("cron is not null or data_prefix is not null", name="has_trigger"),
        CheckConstraint("overlap in ('skip','queue','supersede')", name="overlap"),
        Index(
            "uq_schedules_project_id_name",
            "project_id",
            "name",
            unique=True,
            postgresql_where=text("deleted_at is null"),
        ),
        Index("ix_schedules_next_at", "next_at", postgresql_where=text("deleted_at is null")),
    )


class ScheduleRunRow(Base):
    """One due moment of a schedule and its verdict. That a moment has one row is why nothing runs twice."""

    __tablename__ = "schedule_runs"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"))
    due_at: Mapped[datetime] = mapped_column(Moment)
    cause: Mapped[str] = mapped_column(Text)
    verdict: Mapped[str] = mapped_column(Text)
    code: Mapped[str | None] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    missed: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # earlier moments it stands for
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    content: Mapped[str | None] = mapped_column(Text)  # sha256 of what was to be trained
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (
        UniqueConstraint("schedule_id", "due_at"),
        CheckConstraint("cause in ('cron','change','by_hand')", name="cause"),
        CheckConstraint("verdict in ('started','skipped','refused')", name="verdict"),
        CheckConstraint("(verdict = 'started') = (job_id is not null)", name="started_has_job"),
    )
