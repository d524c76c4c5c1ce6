"""API keys: made once, shown once, stored as a hash. `tp_<32 base62>_<6 base62 of a checksum>`."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from shared.errors import Forbidden, NotFound, Unauthenticated
from shared.ids import new_id
from shared.store.locks import one_at_a_time
from shared.store.tables import ApiKeyRow, OrganizationRow, ProjectRow

ALPHABET: Final = string.digits + string.ascii_letters
SCOPES: Final = frozenset(
    {"*", "jobs:read", "jobs:write", "files:read", "files:write", "models:read", "models:write", "metrics", "admin"}
)
# `*` is everything in the key's own project. The pool and the other projects are not in it.
ADMIN: Final = "admin"
METRICS: Final = "metrics"  # figures of the whole installation, and nothing else
EVERYTHING: Final = ("*", ADMIN)
_SHAPE: Final = re.compile(r"tp_([0-9A-Za-z]{32})_([0-9A-Za-z]{6})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what they may do."""

    key_id: str
    project_id: str
    organization_id: str
    organization_name: str
    scopes: frozenset[str]
    max_tier: str = "interactive"
    max_priority: int = 100

    @property
    def operates(self) -> bool:
        """Whether the key runs the pool: it sees and orders across projects."""
        return ADMIN in self.scopes

    def may(self, scope: str) -> bool:
        """Whether the key has `scope`. `*` stands for every scope but `admin` and `metrics`; `admin` has both."""
        return bool(self.scopes & ({scope, ADMIN} if scope in {ADMIN, METRICS} else {scope, "*"}))

    def must(self, scope: str) -> None:
        """Raises Forbidden unless the key has `scope`."""
        if not self.may(scope):
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


def create(
    session: Session, *, project_id: str, name: str, scopes: Sequence[str] = ("*",), **limits: Any
) -> tuple[ApiKeyRow, str]:
    """Make a key. The second value is the secret, which nothing can show again.

    Args:
        limits: further columns of the key: `max_running`, `max_queued`, `max_tier`, `max_priority`, `expires_at`.
    """
    secret = "".join(secrets.choice(ALPHABET) for _ in range(32))
    bearer = f"tp_{secret}_{_checksum(secret)}"
    row = ApiKeyRow(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=bearer[:7],
        sha256=_digest(bearer),
        scopes=list(scopes),
        **limits,
    )
    session.add(row)
    session.flush()
    return row, bearer


# Nothing of its answer is kept: a revoked key ends with the next request.
OWNERS: Final = (
    select(
        ApiKeyRow.id.label("key_id"),
        ApiKeyRow.project_id,
        OrganizationRow.id.label("organization_id"),
        OrganizationRow.name.label("organization_name"),
        ApiKeyRow.scopes,
        ApiKeyRow.max_tier,
        ApiKeyRow.max_priority,
    )
    .join(ProjectRow, ProjectRow.id == ApiKeyRow.project_id)
    .join(OrganizationRow, OrganizationRow.id == ProjectRow.organization_id)
    .where(ApiKeyRow.revoked_at.is_(None), ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > func.now()))
)
# Every request asks this, so it is built once.
_OWNER: Final = OWNERS.where(ApiKeyRow.sha256 == bindparam("sha256"))


def authenticate(session: Session, bearer: str) -> Caller:
    """Who this key belongs to. Junk fails its checksum before the database is asked. Raises Unauthenticated."""
    shape = _SHAPE.fullmatch(bearer)
    if shape is None or _checksum(shape[1]) != shape[2]:
        raise Unauthenticated("Incorrect API key provided. Keys look like tp_…; check for missing characters.")
    row = session.connection().execute(_OWNER, {"sha256": _digest(bearer)}).one_or_none()
    if row is None:
        raise Unauthenticated("This API key is unknown, revoked or expired.")
    return caller_of(row._mapping)


def caller_of(owner: Mapping[Any, Any]) -> Caller:
    """The caller that a row of `OWNERS` describes."""
    return Caller(**{**owner, "scopes": frozenset(owner["scopes"])})


def revoke(session: Session, key_id: str) -> None:
    """End a key at once. Raises NotFound."""
    row = find(session, key_id)
    row.revoked_at = row.revoked_at or session.scalar(select(func.now()))


def find(session: Session, key_id: str) -> ApiKeyRow:
    """A key with its row's lock. Raises NotFound."""
    row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.id == key_id).with_for_update()).one_or_none()
    if row is None:
        raise NotFound(f"No API key '{key_id[:100]}'.", param="key_id")
    return row


def listed(session: Session, *, project_id: str | None = None) -> Sequence[ApiKeyRow]:
    """The keys of a project, or all of them; revoked ones too."""
    query = select(ApiKeyRow).order_by(ApiKeyRow.id)
    return session.scalars(query if project_id is None else query.where(ApiKeyRow.project_id == project_id)).all()


def ensure_default(session: Session) -> str | None:
    """On a first start: an organization, a project and a key, whose secret is returned. Later: None."""
    if session.scalar(select(func.count()).select_from(ApiKeyRow)):
        return None
    return create(session, project_id=_default_project(session), name="default", scopes=EVERYTHING)[1]


def first_project(session: Session) -> str | None:
    """On a database without any project: make the default one and return its id. Else None.

    Two callers at once make one between them: the later waits, and finds it.
    """
    one_at_a_time(session, "first project")
    if session.scalar(select(ProjectRow.id).limit(1)) is not None:
        return None
    return _default_project(session)


def _default_project(session: Session) -> str:
    organization = OrganizationRow(id=new_id("org_"), name="default")
    session.add(organization)
    session.flush()
    project = ProjectRow(id=new_id("proj_"), organization_id=organization.id, name="default")
    session.add(project)
    session.flush()
    return project.id
