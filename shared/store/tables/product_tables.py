"""Files, adapters, merges, preflights and base models: what the CPU lane works on, and what users keep."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Leased, Moment, ProductColumns, product_arguments


class FileRow(Leased, Base):
    """An uploaded file, or one that a job made. The row is made when the bytes are complete in the store."""

    __tablename__ = "files"

    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    # By its first bytes the file is no JSONL: a program makes rows of it. Null: the version that took it did not look.
    packed: Mapped[bool | None] = mapped_column(Boolean)
    # The JSONL rows that the check made of a file that is none, which is what jobs read.
    rows_key: Mapped[str | None] = mapped_column(Text)
    rows_sha256: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    status_details: Mapped[str | None] = mapped_column(Text)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    # The columns keep the names that the version before this one writes: versions run side by side.
    fence: Mapped[int] = mapped_column("check_attempts", Integer, default=0, server_default=text("0"))
    lease_until: Mapped[datetime | None] = mapped_column("check_until", Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Moment)
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('uploaded','processed','error')", name="status"),
        Index("ix_files_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_files_unchecked", "id", postgresql_where=text("status = 'uploaded' and deleted_at is null")),
    )


class AdapterRow(Base):
    """The product of a job, known by its `ft:` name."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text, unique=True)
    base_model: Mapped[str] = mapped_column(Text)
    manifest: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        Index("ix_adapters_project_id_id", "project_id", "id", postgresql_where=text("deleted_at is null")),
    )


class PermissionRow(Base):
    """Another project may use a tuned model or a checkpoint."""

    __tablename__ = "checkpoint_permissions"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    checkpoint: Mapped[str] = mapped_column(Text)  # its `ft:` name, which is never used again
    owner_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (
        UniqueConstraint("checkpoint", "project_id"),
        Index("ix_checkpoint_permissions_project_id", "project_id"),
    )


class MergeRow(ProductColumns, Base):
    """A product made of adapters without training: a merged model directory, or a weighted combination."""

    __tablename__ = "merges"
    __table_args__ = product_arguments(__tablename__, kinds="'merge','combination'")


class ExportRow(ProductColumns, Base):
    """A tuned model as files for another server, or on its way to a hub. Of a push the manifest says what is there."""

    __tablename__ = "exports"
    __table_args__ = product_arguments(__tablename__, kinds="'gguf','gguf_lora','hub'")


class PreflightRow(Leased, Base):
    """A question about a job that is not submitted."""

    __tablename__ = "preflights"

    status: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(Integer)
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)  # while it runs: contract/preflight_report.py
    sample: Mapped[dict[str, Any] | None] = mapped_column(Json)  # the answer of some rows, before all are read
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    # The columns keep the names that the version before this one writes: versions run side by side.
    fence: Mapped[int] = mapped_column("checker", Integer, default=0, server_default=text("0"))
    lease_until: Mapped[datetime | None] = mapped_column("check_until", Moment)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("status in ('queued','running','succeeded','failed')", name="status"),
        Index("ix_preflights_project_id_id", "project_id", "id"),
        Index("ix_preflights_waiting", "id", postgresql_where=text("status in ('queued','running')")),
    )


class AddedModelRow(Base):
    """An entry of the catalogue that was added by a route. What it names is looked up: see `BaseModelRow`."""

    __tablename__ = "added_models"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    locator: Mapped[str] = mapped_column(Text)  # hub: repository; path: folder
    revision: Mapped[str] = mapped_column(Text)  # hub: a branch, a tag or a commit; path: empty
    aliases: Mapped[list[str]] = mapped_column(Json, default=list, server_default=text("'[]'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (CheckConstraint("source in ('hub','path')", name="source"),)


class BaseModelRow(Leased, Base):
    """What a worker found of a hub's repository at a revision, or in a folder. The commit never changes."""

    __tablename__ = "base_models"

    project_id: Mapped[str] = mapped_column(Text, default="", server_default=text("''"))  # the installation's
    name: Mapped[str] = mapped_column(Text)  # the catalogue's entry that asked first
    source: Mapped[str] = mapped_column(Text)
    locator: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(Text)  # as asked: a branch, a tag or a commit
    commit: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    config: Mapped[str | None] = mapped_column(Text)  # config.json as published; facts are derived when it is read
    weights: Mapped[dict[str, Any] | None] = mapped_column(Json)  # what the headers of its safetensors files say
    description: Mapped[dict[str, Any] | None] = mapped_column(Json)  # shared/contract/model_description.py
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (CheckConstraint("state in ('resolving','ready','error')", name="state"),)


class FetchRow(Leased, Base):
    """A base model that a worker is to bring to its host before a job needs it."""

    __tablename__ = "fetches"

    project_id: Mapped[str] = mapped_column(Text, default="", server_default=text("''"))  # the installation's
    worker_id: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)  # name of the catalogue's entry
    revision: Mapped[str] = mapped_column(Text)  # as pinned
    state: Mapped[str] = mapped_column(Text)
    bytes_done: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    bytes_total: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    error: Mapped[str | None] = mapped_column(Text)
    code: Mapped[str | None] = mapped_column(Text)  # of an error that only people can mend
    updated_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (CheckConstraint("state in ('waiting','fetching','done','error')", name="state"),)
