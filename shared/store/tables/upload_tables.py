"""Uploads that come in parts, and the parts that have come. A completed one is a file as any other."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class UploadRow(Base):
    """A file that is on its way. While it is open its bytes are reserved in the project's quota."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    status: Mapped[str] = mapped_column(Text, default="pending", server_default=text("'pending'"))
    bytes: Mapped[int] = mapped_column(BigInteger)  # of the whole file, as it was announced
    filename: Mapped[str] = mapped_column(Text)
    mime_type: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    file_lives_seconds: Mapped[int | None] = mapped_column(Integer)
    part_ids: Mapped[list[str] | None] = mapped_column(Json)  # of a completed one, in the order of the file
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Moment)
    ended_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('pending','completed','cancelled','expired')", name="status"),
        CheckConstraint("(status = 'completed') = (file_id is not null)", name="completion_has_file"),
        CheckConstraint("(status = 'pending') = (ended_at is null)", name="end_has_moment"),
        Index("ix_uploads_open", "project_id", "expires_at", postgresql_where=text("status = 'pending'")),
        Index("ix_uploads_ended_at", "ended_at", postgresql_where=text("ended_at is not null")),
    )


class UploadPartRow(Base):
    """A part whose bytes are in the store. The same bytes twice are the same part: clients send again what was lost."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (UniqueConstraint("upload_id", "sha256"),)
