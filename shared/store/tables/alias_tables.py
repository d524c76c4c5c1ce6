"""Aliases of tuned models, such as `support-bot@prod`, and every version that each of them has had."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class AliasRow(Base):
    """What an alias names now. `version` guards every move; 0: it has named nothing yet."""

    __tablename__ = "aliases"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    model_id: Mapped[str | None] = mapped_column(Text)  # of an adapter, a checkpoint or a combination
    fallback_id: Mapped[str | None] = mapped_column(Text)  # what a rollback would name; kept as well
    movers: Mapped[list[str] | None] = mapped_column(Json)  # ids of the keys that may move it; null: any key
    approvals: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))  # that a promotion needs
    approvers: Mapped[list[str] | None] = mapped_column(Json)  # ids of the keys that may approve; null: any key
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    moved_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("(version = 0) = (model_id is null)", name="version_has_model"),
        Index(
            "uq_aliases_project_id_name", "project_id", "name", unique=True, postgresql_where=text("deleted_at is null")
        ),
    )


class AliasVersionRow(Base):
    """One move of an alias: to which model, by whom, when and why. Only ever inserted."""

    __tablename__ = "alias_versions"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    alias_id: Mapped[str] = mapped_column(ForeignKey("aliases.id"))
    number: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    model_id: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(Text)  # null: a combination
    restores: Mapped[int | None] = mapped_column(Integer)  # rollback: the number of the version that holds again
    gate: Mapped[dict[str, Any] | None] = mapped_column(Json)  # its result, with the evidence
    forced: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    reason: Mapped[str | None] = mapped_column(Text)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    approved_by: Mapped[list[str] | None] = mapped_column(Json)  # ids of keys; null: no approval was needed
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (
        UniqueConstraint("alias_id", "number"),
        CheckConstraint("kind in ('promote','rollback')", name="kind"),
        CheckConstraint("(kind = 'rollback') = (restores is not null)", name="rollback_restores"),
    )


class PromotionRow(Base):
    """A promotion of an alias that needs approvals. It moves the alias when they are there, and ends once."""

    __tablename__ = "promotions"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    alias_id: Mapped[str] = mapped_column(ForeignKey("aliases.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))  # who asked
    model: Mapped[str] = mapped_column(Text)
    model_id: Mapped[str] = mapped_column(Text)
    from_version: Mapped[int] = mapped_column(Integer)  # of the alias as it was asked for
    wish: Mapped[dict[str, Any]] = mapped_column(Json)  # asked name, gate, force: it is judged again as it moves
    gate: Mapped[dict[str, Any] | None] = mapped_column(Json)  # its result when it was asked for
    reason: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text, default="pending", server_default=text("'pending'"))
    outcome: Mapped[str | None] = mapped_column(Text)  # why it ended without a move
    code: Mapped[str | None] = mapped_column(Text)
    ended_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    version: Mapped[int | None] = mapped_column(Integer)  # that it became
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Moment)
    ended_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("state in ('pending','moved','withdrawn','expired','overtaken','refused')", name="state"),
        CheckConstraint("(state = 'pending') = (ended_at is null)", name="ended"),
        Index(
            "uq_promotions_pending",
            "alias_id",
            "model_id",
            unique=True,
            postgresql_where=text("state = 'pending'"),
        ),
        Index("ix_promotions_project_id", "project_id", "id"),
    )


class ApprovalRow(Base):
    """A key's consent to a promotion. A key has one."""

    __tablename__ = "promotion_approvals"

    promotion_id: Mapped[str] = mapped_column(ForeignKey("promotions.id"), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
