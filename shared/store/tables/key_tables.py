"""Further secrets of API keys, and the rules by which ID tokens are exchanged for such secrets."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Integer, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from shared.store.db import Base
from shared.store.tables.column_types import Json, Moment


class KeySecretRow(Base):
    """A secret that opens a key for a while: a former one, or one that an ID token was exchanged for."""

    __tablename__ = "key_secrets"

    sha256: Mapped[str] = mapped_column(Text, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    prefix: Mapped[str] = mapped_column(Text)
    origin: Mapped[str | None] = mapped_column(Text, unique=True)  # SHA-256 of issuer and jti: a token buys one secret
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Moment)
    kept_until: Mapped[datetime] = mapped_column(Moment, index=True)  # the row: no earlier than its token's own end
    last_used_at: Mapped[datetime | None] = mapped_column(Moment)


class OidcRuleRow(Base):
    """Whose ID tokens become secrets of a key. The key is the rule's own and has no lasting secret."""

    __tablename__ = "oidc_rules"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), unique=True)
    issuer: Mapped[str] = mapped_column(Text, index=True)
    audience: Mapped[str] = mapped_column(Text)
    claims: Mapped[dict[str, str]] = mapped_column(Json)
    life_seconds: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Moment, server_default=func.now())
