"""A key's new secret, and how long its former ones stay valid: whoever uses one has time to take the new one.

A rotation whose answer was lost is simply made again: the secret in use stays valid until its own time is over.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from shared.errors import Conflict
from shared.store.tables import ApiKeyRow, KeySecretRow
from shared.tenants import keys


def rotate(session: Session, key_id: str, *, overlap: timedelta) -> tuple[ApiKeyRow, str]:
    """A new secret for a key, whose id and rights stay. Its secrets until now are former ones.

    Args:
        overlap: how long the one that was valid until now stays valid; zero: it and older ones end at once.

    Raises NotFound, Conflict for a key that has ended or has no lasting secret.
    """
    row = keys.find(session, key_id)
    now: datetime = session.scalars(select(func.now())).one()
    if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        raise Conflict("This key has ended; make a new one.", param="key_id", code="key_ended")
    if row.prefix.startswith(keys.EXCHANGED):
        raise Conflict("This key has no secret of its own; it belongs to a rule for ID tokens.", code="key_of_a_rule")
    until = now + overlap
    session.add(
        KeySecretRow(
            sha256=row.sha256,
            key_id=row.id,
            prefix=row.prefix,
            expires_at=until,
            kept_until=until,
            last_used_at=row.last_used_at,
        )
    )
    if not overlap:
        end_secrets(session, key_id)
    bearer = keys.new_secret()
    row.sha256, row.prefix, row.last_used_at, row.rotated_at = keys.digest(bearer), keys.shown(bearer), None, now
    row.former_until = max(until, row.former_until or until) if overlap else now
    session.flush()
    return row, bearer


def end_secrets(session: Session, key_id: str) -> None:
    """End every secret of a key but its lasting one, at once."""
    live = (KeySecretRow.key_id == key_id, KeySecretRow.expires_at > func.now())
    session.execute(update(KeySecretRow).where(*live).values(expires_at=func.now()))


def former(session: Session, key_ids: Collection[str]) -> dict[str, list[KeySecretRow]]:
    """key id -> its former secrets that are still valid, the youngest first."""
    query = select(KeySecretRow).where(
        KeySecretRow.key_id.in_(key_ids),
        KeySecretRow.prefix.startswith(keys.LASTING, autoescape=True),
        KeySecretRow.expires_at > func.now(),
    )
    by_key: dict[str, list[KeySecretRow]] = {}
    for row in session.scalars(query.order_by(KeySecretRow.created_at.desc())):
        by_key.setdefault(row.key_id, []).append(row)
    return by_key


def forget(session: Session) -> None:
    """Drop secrets that have ended and whose ID tokens have, too."""
    session.execute(delete(KeySecretRow).where(KeySecretRow.kept_until < func.now()))
