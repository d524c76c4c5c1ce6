"""API keys: made once, shown once, stored as a hash. `tp_<32 base62>_<6 base62 of a checksum>`."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.errors import Forbidden, NotFound, Unauthenticated
from shared.ids import new_id
from shared.tables import ApiKeyRow, OrganizationRow, ProjectRow

ALPHABET: Final = string.digits + string.ascii_letters
SCOPES: Final = frozenset(
    {"*", "jobs:read", "jobs:write", "files:read", "files:write", "models:read", "models:write", "admin"}
)
_SHAPE: Final = re.compile(r"tp_([0-9A-Za-z]{32})_([0-9A-Za-z]{6})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what they may do."""

    key_id: str
    project_id: str
    organization_id: str
    organization_name: str
    scopes: frozenset[str]

    def must(self, scope: str) -> None:
        """Raises Forbidden unless the key has `scope`."""
        if not self.scopes & {scope, "*"}:
            raise Forbidden(
                f"This API key lacks the scope '{scope}'. Use a key that has it, or ask your administrator."
            )


def _checksum(secret: str) -> str:
    number, digits = zlib.crc32(secret.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def _digest(bearer: str) -> str:
    # 190 random bits need no slow hash: there is no guessing them.
    return hashlib.sha256(bearer.encode()).hexdigest()


def create(session: Session, *, project_id: str, name: str, scopes: Sequence[str] = ("*",)) -> tuple[ApiKeyRow, str]:
    """Make a key. The second value is the secret, which nothing can show again."""
    secret = "".join(secrets.choice(ALPHABET) for _ in range(32))
    bearer = f"tp_{secret}_{_checksum(secret)}"
    row = ApiKeyRow(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=bearer[:7],
        sha256=_digest(bearer),
        scopes=list(scopes),
    )
    session.add(row)
    session.flush()
    return row, bearer


def authenticate(session: Session, bearer: str) -> Caller:
    """Who this key belongs to. Junk fails its checksum before the database is asked. Raises Unauthenticated."""
    shape = _SHAPE.fullmatch(bearer)
    if shape is None or _checksum(shape[1]) != shape[2]:
        raise Unauthenticated("Incorrect API key provided. Keys look like tp_…; check for missing characters.")
    row = session.execute(
        select(ApiKeyRow.id, ApiKeyRow.project_id, ApiKeyRow.scopes, OrganizationRow.id, OrganizationRow.name)
        .join(ProjectRow, ProjectRow.id == ApiKeyRow.project_id)
        .join(OrganizationRow, OrganizationRow.id == ProjectRow.organization_id)
        .where(
            ApiKeyRow.sha256 == _digest(bearer),
            ApiKeyRow.revoked_at.is_(None),
            ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > func.now()),
        )
    ).one_or_none()
    if row is None:
        raise Unauthenticated("This API key is unknown, revoked or expired.")
    key_id, project_id, scopes, organization_id, organization_name = row
    return Caller(key_id, project_id, organization_id, organization_name, frozenset(scopes))


def revoke(session: Session, key_id: str) -> None:
    """End a key at once. Raises NotFound."""
    ended = session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.id == key_id)
        .values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, func.now()))
        .returning(ApiKeyRow.id)
    ).one_or_none()
    if ended is None:
        raise NotFound(f"No API key '{key_id[:100]}'.")


def listed(session: Session) -> Sequence[ApiKeyRow]:
    return session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.id)).all()


def ensure_default(session: Session) -> str | None:
    """On a first start: an organization, a project and a key, whose secret is returned. Later: None."""
    if session.scalar(select(func.count()).select_from(ApiKeyRow)):
        return None
    organization = OrganizationRow(id=new_id("org_"), name="default")
    session.add(organization)
    session.flush()
    project = ProjectRow(id=new_id("proj_"), organization_id=organization.id, name="default")
    session.add(project)
    session.flush()
    return create(session, project_id=project.id, name="default")[1]
