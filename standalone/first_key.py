"""The keys that a first start makes: the API key in `credentials.json`, and the one that signs adapters."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.errors import Unauthenticated
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from shared.store.tables import ProjectRow
from shared.tenants import keys, signing_keys


def working_key(database_url: str, *, known: str, ours: bool) -> str:
    """An API key that opens this database, or the empty string; made again only if the known one no longer works.

    Args:
        known: of an earlier start.
        ours: whether the database is this home's own. In another's we make no key beyond its very first.
    """
    engine = make_engine(database_url)
    try:
        with session_scope(engine) as session:
            return keys.ensure_default(session) or _known_or_new(session, known=known, ours=ours)
    finally:
        engine.dispose()


def _known_or_new(session: Session, *, known: str, ours: bool) -> str:
    try:
        keys.authenticate(session, known)
    except Unauthenticated:
        # A first start that failed half-way told nobody its key; nobody can be told again.
        oldest = session.scalar(select(ProjectRow.id).order_by(ProjectRow.id).limit(1)) if ours else None
        if oldest is None:
            return ""
        return keys.create(session, project_id=oldest, name="credentials.json", scopes=keys.EVERYTHING)[1]
    return known


def signing_key(database_url: str, settings: Settings) -> None:
    """See that a key signs adapters, where something can encrypt it or a file has it. Raises Invalid."""
    engine = make_engine(database_url)
    try:
        with session_scope(engine) as session:
            signing_keys.ensure(session, settings)
    finally:
        engine.dispose()
