"""Webhooks, and what is to be delivered to them: a row is made by the transaction that ends the job."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Leased, Moment


class WebhookRow(Base):
    """A project's address that gets messages about its jobs. Secrets are encrypted (shared/tenants/secret_box.py)."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    event_types: Mapped[list[str]] = mapped_column(Json)
    rich: Mapped[bool] = mapped_column(Boolean, default=False, server_default=text("false"))
    secret: Mapped[str] = mapped_column(Text)
    secret_hint: Mapped[str] = mapped_column(Text)
    former_secret: Mapped[str | None] = mapped_column(Text)
    former_until: Mapped[datetime | None] = mapped_column(Moment)
    enabled: Mapped[bool] = mapped_column(Boolean, default=True, server_default=text("true"))
    disabled_reason: Mapped[str | None] = mapped_column(Text)
    failing_since: Mapped[datetime | None] = mapped_column(Moment)  # null: its last delivery was taken
    rests_until: Mapped[datetime | None] = mapped_column(Moment)  # after a failure nobody is sent there for a while
    # Tries by what came of them. They only grow; the deliveries themselves are forgotten after a month.
    delivered_count: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    failed_count: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    given_up_count: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (Index("ix_webhooks_project_id", "project_id", "id", postgresql_where=text("deleted_at is null")),)


class DeliveryRow(Leased, Base):
    """One event on its way to one webhook. What is sent follows from the row and the ended job: it never changes."""

    __tablename__ = "webhook_deliveries"

    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    event_id: Mapped[str] = mapped_column(Text)
    event_type: Mapped[str] = mapped_column(Text)
    event_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))  # null: of something else, or a test
    subject: Mapped[str | None] = mapped_column(Text)  # the id of what else it is of
    details: Mapped[dict[str, Any] | None] = mapped_column(Json)  # what a rich body says of that
    state: Mapped[str] = mapped_column(Text, default="waiting", server_default=text("'waiting'"))
    tries: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    log: Mapped[list[dict[str, Any]]] = mapped_column(Json, default=list, server_default=text("'[]'::jsonb"))
    next_try_at: Mapped[datetime | None] = mapped_column(Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("state in ('waiting','delivered','failed')", name="state"),
        Index("ix_webhook_deliveries_webhook_id", "webhook_id", "id"),
        Index(
            "ix_webhook_deliveries_waiting", "webhook_id", "job_id", "id", postgresql_where=text("state = 'waiting'")
        ),
        Index("ix_webhook_deliveries_finished_at", "finished_at", postgresql_where=text("finished_at is not null")),
    )
