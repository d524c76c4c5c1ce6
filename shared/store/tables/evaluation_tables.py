"""Evaluations, and the answers that came of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Leased, Moment


class EvaluationRow(Leased, Base):
    """Subjects that are measured on the same items."""

    __tablename__ = "evaluations"

    status: Mapped[str] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    # What each subject stood for when it was asked about: an alias may move meanwhile.
    targets: Mapped[list[dict[str, Any]]] = mapped_column(Json)
    # Of a run of OpenAI's evals: the eval, and what only the wire of runs shows of it.
    eval_id: Mapped[str | None] = mapped_column(ForeignKey("evals.id"))
    run: Mapped[dict[str, Any] | None] = mapped_column(Json)
    file_id: Mapped[str | None] = mapped_column(Text)  # where the items are; null: a suite of ours
    items: Mapped[int | None] = mapped_column(Integer)  # null: not read yet
    answered: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    device: Mapped[str | None] = mapped_column(Text)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    # Of a queued one it is why it waits.
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('queued','running','succeeded','failed','cancelled')", name="status"),
        CheckConstraint("(status = 'succeeded') = (report is not null)", name="success_has_report"),
        CheckConstraint(
            "(status in ('succeeded','failed','cancelled')) = (finished_at is not null)", name="end_has_moment"
        ),
        Index("ix_evaluations_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
        Index(
            "ix_evaluations_unfinished",
            "id",
            postgresql_where=text("status in ('queued','running') and deleted_at is null"),
        ),
        Index(
            "ix_evaluations_eval_id_id",
            "eval_id",
            "id",
            postgresql_where=text("eval_id is not null and deleted_at is null"),
        ),
    )


class EvalRow(Base):
    """An eval of OpenAI's wire: the shape of items and the criteria of its runs."""

    __tablename__ = "evals"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)  # `contract.evals.CreateEval`
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (Index("ix_evals_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),)


class EvaluationAnswerRow(Base):
    """What one subject made of one item. The key is what keeps an item from being answered twice."""

    __tablename__ = "evaluation_answers"

    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True)
    part: Mapped[str] = mapped_column(Text, primary_key=True)
    item: Mapped[int] = mapped_column(Integer, primary_key=True)  # counted from 1
    subject: Mapped[int] = mapped_column(Integer, primary_key=True)  # its place in the request
    document: Mapped[dict[str, Any]] = mapped_column(Json)  # `contract.evaluation.StoredAnswer`

    __table_args__ = (CheckConstraint("part in ('items','forgetting')", name="part"),)
