"""API keys: made once, shown once, stored as a hash. `tp_<32 base62>_<6 base62 of a checksum>`.

The form is that of GitHub's tokens ("Behind GitHub's new authentication token formats", github.blog, 2021): a prefix
that scanners of leaked secrets look for, and a CRC32 in base62, by which a mistyped key is known before
the database is asked. A secret that an ID token was exchanged for (shared/tenants/oidc_rules.py) begins with `tpo_`.

A key has one lasting secret. Its former ones (shared/tenants/rotation.py), and exchanged ones, are rows of their own
and end by themselves.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, bindparam, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.errors import Forbidden, NotFound, Unauthenticated
from shared.ids import new_id
from shared.store.locks import one_at_a_time
from shared.store.tables import ApiKeyRow, KeySecretRow, OrganizationRow, ProjectRow

ALPHABET: Final = string.digits + string.ascii_letters
SCOPES: Final = frozenset(
    {"*", "jobs:read", "jobs:write", "files:read", "files:write", "models:read", "models:write", "metrics", "admin"}
)
# `*` is everything in the key's own project. The pool and the other projects are not in it.
ADMIN: Final = "admin"
METRICS: Final = "metrics"  # figures of the whole installation, and nothing else
EVERYTHING: Final = ("*", ADMIN)
LASTING: Final = "tp_"
EXCHANGED: Final = "tpo_"
# How old `last_used_at` may be before it is written again: a request is rarely a write.
USED_SECONDS: Final = 300
_SHAPE: Final = re.compile(r"(tpo?_)([0-9A-Za-z]{32})_([0-9A-Za-z]{6})")


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


def new_secret(prefix: str = LASTING) -> str:
    """A secret that nobody has seen yet."""
    secret = "".join(secrets.choice(ALPHABET) for _ in range(32))
    return f"{prefix}{secret}_{_checksum(secret)}"


def digest(bearer: str) -> str:
    """What is stored of a secret: its SHA-256 in hexadecimal digits."""
    # 190 random bits need no slow hash: there is no guessing them.
    return hashlib.sha256(bearer.encode()).hexdigest()


def shown(bearer: str) -> str:
    """What lists show of a secret: its prefix and four characters."""
    return bearer[: bearer.index("_") + 5]


def masked(bearer: str) -> str:
    """What a refusal shows of a key, so that its owner knows which of theirs it is: never more than a third."""
    shown_characters = min(4, len(bearer) // 6)
    ends = bearer[:shown_characters], bearer[len(bearer) - shown_characters :]
    return f"{ends[0]}****{ends[1]}"


def create(
    session: Session, *, project_id: str, name: str, scopes: Sequence[str] = ("*",), **limits: Any
) -> tuple[ApiKeyRow, str]:
    """Make a key. The second value is the secret, which nothing can show again.

    Args:
        limits: further columns of the key: `max_running`, `max_queued`, `max_tier`, `max_priority`, `expires_at`.
    """
    bearer = new_secret()
    row = ApiKeyRow(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=shown(bearer),
        sha256=digest(bearer),
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


def _unnoted(column: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """Whether a use would be news to the row."""
    return or_(column.is_(None), column < func.now() - timedelta(seconds=USED_SECONDS))


# Every request asks the first, so both are built once. The second is for secrets that are not a key's lasting one.
_OWNER: Final = OWNERS.add_columns(_unnoted(ApiKeyRow.last_used_at).label("unnoted")).where(
    ApiKeyRow.sha256 == bindparam("sha256")
)
_OWNER_FOR_NOW: Final = (
    OWNERS.join(KeySecretRow, KeySecretRow.key_id == ApiKeyRow.id)
    .add_columns(_unnoted(KeySecretRow.last_used_at).label("unnoted"))
    .where(KeySecretRow.sha256 == bindparam("sha256"), KeySecretRow.expires_at > func.now())
)


def authenticate(session: Session, bearer: str) -> Caller:
    """Who this key belongs to. Raises Unauthenticated; for a mistyped key before the database is asked.

    Notes the use, unless the last note is younger than `USED_SECONDS`.
    """
    lasting = _prefix_of(bearer) == LASTING
    return _owner(session.connection(), bearer, lasting=lasting)


def authenticate_request(connect: Callable[[], Connection], bearer: str) -> Caller:
    """`authenticate` without a session: every request asks, and a session costs half as much as the question."""
    lasting = _prefix_of(bearer) == LASTING
    with connect() as connection:
        return _owner(connection, bearer, lasting=lasting)


def _owner(connection: Connection, bearer: str, *, lasting: bool) -> Caller:
    asked = {"sha256": digest(bearer)}
    row = connection.execute(_OWNER, asked).one_or_none() if lasting else None
    second = row is None
    row = connection.execute(_OWNER_FOR_NOW, asked).one_or_none() if row is None else row
    if row is None:
        raise Unauthenticated(f"Incorrect API key provided: {masked(bearer)}. It is unknown, revoked or expired.")
    owner = dict(row._mapping)
    if owner.pop("unnoted"):
        _note_use(connection, owner["key_id"], sha256=asked["sha256"] if second else None)
    return caller_of(owner)


def _prefix_of(bearer: str) -> str:
    """Raises Unauthenticated when the key cannot be one of ours."""
    shape = _SHAPE.fullmatch(bearer)
    if shape is None:
        raise Unauthenticated(
            f"Incorrect API key provided: {masked(bearer)}. Keys look like tp_…; check for missing characters."
        )
    if _checksum(shape[2]) != shape[3]:
        raise Unauthenticated(
            f"Incorrect API key provided: {masked(bearer)}. Its checksum does not fit: it is mistyped. Copy it again."
        )
    return shape[1]


def note_use(session: Session, key_id: str) -> None:
    """Note that a key was used, by its lasting secret or by a sign-in to the page."""
    _note_use(session.connection(), key_id, sha256=None)


def _note_use(connection: Connection, key_id: str, *, sha256: str | None) -> None:
    """Never waits for a row that somebody else holds: another request notes the use as well."""
    table, own = (
        (ApiKeyRow, ApiKeyRow.id == key_id) if sha256 is None else (KeySecretRow, KeySecretRow.sha256 == sha256)
    )
    free = select(own.left).where(own, _unnoted(table.last_used_at)).with_for_update(key_share=True, skip_locked=True)
    connection.execute(update(table).where(own.left == free.scalar_subquery()).values(last_used_at=func.now()))


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
