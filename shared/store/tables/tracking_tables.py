"""Secrets of projects, and what is brought from a job's events to a tracker such as Weights & Biases."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Leased, Moment


class ProjectSecretRow(Base):
    """A value that a project keeps for what is done in its name, encrypted (shared/tenants/secret_box.py)."""

    __tablename__ = "project_secrets"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    sealed: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())


class TrackingRow(Leased, Base):
    """One job on its way to one tracker. All of its events up to `cursor` are there."""

    __tablename__ = "trackings"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    place: Mapped[int] = mapped_column(Integer)  # among the integrations of its job
    tracker: Mapped[str] = mapped_column(Text)
    options: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[str] = mapped_column(Text, default="waiting", server_default=text("'waiting'"))
    cursor: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))  # `seq` of an event
    last_step: Mapped[int | None] = mapped_column(Integer)  # of the points that are there
    run_id: Mapped[str | None] = mapped_column(Text)  # as the tracker calls it
    url: Mapped[str | None] = mapped_column(Text)
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    tries: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # in a row that failed
    failing_since: Mapped[datetime | None] = mapped_column(Moment)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("tracker in ('wandb','mlflow','tensorboard')", name="tracker"),
        CheckConstraint("state in ('waiting','done','failed')", name="state"),
        UniqueConstraint("job_id", "place"),
        Index("ix_trackings_waiting", "id", postgresql_where=text("state = 'waiting'")),
    )
