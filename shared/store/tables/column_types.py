"""The types of columns that all tables share, and the columns of a lease."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

Moment = DateTime(timezone=True)
Json = JSONB(none_as_null=True)


class Leased:
    """The columns of a lease, for every row that workers work on. shared/lease has the verbs."""

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    fence: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    failures: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(Moment)


class ProductColumns(Leased):
    """What the CPU lane makes of tuned models: asked for, and made until its manifest says which files it has."""

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


def product_arguments(table: str, *, kinds: str) -> tuple[CheckConstraint | Index, ...]:
    """Constraints and indexes of such a table."""
    return (
        CheckConstraint(f"kind in ({kinds})", name="kind"),
        CheckConstraint("status in ('queued','running','succeeded','failed')", name="status"),
        CheckConstraint("(status = 'succeeded') = (manifest is not null)", name="success_has_manifest"),
        CheckConstraint("(status in ('succeeded','failed')) = (finished_at is not null)", name="end_has_moment"),
        Index(f"ix_{table}_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
        Index(
            f"ix_{table}_unfinished",
            "id",
            postgresql_where=text("status in ('queued','running') and deleted_at is null"),
        ),
    )
