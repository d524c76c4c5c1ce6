"""Organizations, projects, API keys, and the audit of what people did with them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class OrganizationRow(Base):
    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())


class ProjectRow(Base):
    """A tenant: it owns files, jobs, adapters and keys, and has a share of the pool."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(Text)
    weight: Mapped[float] = mapped_column(default=1.0, server_default=text("1"))
    guarantee: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    max_running: Mapped[int | None] = mapped_column(Integer)
    max_queued: Mapped[int | None] = mapped_column(Integer)
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of files; None: as the settings say
    max_files: Mapped[int | None] = mapped_column(Integer)
    budget_device_seconds: Mapped[float | None]  # a calendar month's hard limit (UTC)
    budget_soft_device_seconds: Mapped[float | None]  # beyond it the project is warned
    usage: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    usage_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    held: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (UniqueConstraint("organization_id", "name"),)


class ApiKeyRow(Base):
    """A bearer key: the secret itself is never stored, only its SHA-256."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(Text, unique=True)
    scopes: Mapped[list[str]] = mapped_column(Json)
    max_running: Mapped[int | None] = mapped_column(Integer)
    max_queued: Mapped[int | None] = mapped_column(Integer)
    max_tier: Mapped[str] = mapped_column(Text, default="interactive", server_default=text("'interactive'"))
    max_priority: Mapped[int] = mapped_column(Integer, default=100, server_default=text("100"))
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Moment)
    revoked_at: Mapped[datetime | None] = mapped_column(Moment)
    last_used_at: Mapped[datetime | None] = mapped_column(Moment)  # coarsely: shared/tenants/keys.py
    rotated_at: Mapped[datetime | None] = mapped_column(Moment)
    former_until: Mapped[datetime | None] = mapped_column(Moment)  # the last of its former secrets


class SignInRow(Base):
    """A browser that is signed in to the page with a key. Its token itself is never stored, only its SHA-256."""

    __tablename__ = "sign_ins"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    sha256: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())

    __table_args__ = (Index("ix_sign_ins_key_id", "key_id"),)


class AuditRow(Base):
    """One act of operation: who did what to what, and how it stood before and after. Only ever inserted."""

    __tablename__ = "audit"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    action: Mapped[str] = mapped_column(Text)
    target: Mapped[str] = mapped_column(Text)
    before: Mapped[dict[str, Any] | None] = mapped_column(Json)
    after: Mapped[dict[str, Any] | None] = mapped_column(Json)

    __table_args__ = (Index("ix_audit_target", "target", "id"),)


class SigningKeyRow(Base):
    """A key that signs, or has signed, where adapters come from. Its id is the sha256 of the public key."""

    __tablename__ = "signing_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    algorithm: Mapped[str] = mapped_column(Text, default="ed25519", server_default=text("'ed25519'"))
    public_key: Mapped[str] = mapped_column(Text)  # PEM
    sealed: Mapped[str | None] = mapped_column(Text)  # the private key, encrypted; null: it lies in a file, or is gone
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    retired_at: Mapped[datetime | None] = mapped_column(Moment)  # it signs no more, and verifies as before

    __table_args__ = (
        # Of each algorithm at most one signs.
        Index("uq_signing_keys_signs", "algorithm", unique=True, postgresql_where=text("retired_at is null")),
    )
