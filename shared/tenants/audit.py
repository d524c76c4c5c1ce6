"""The audit: who did what to what, with the state before and after. Entries are only added, in the act's commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.ids import new_id
from shared.store import paging
from shared.store.tables import AuditRow
from shared.tenants.keys import Caller

Facts = dict[str, Any]


def record(
    session: Session,
    caller: Caller,
    action: str,
    target: str,
    *,
    before: Facts | None = None,
    after: Facts | None = None,
) -> None:
    """Note an act. `action` is noun.verb, `target` an id; the facts never hold a secret."""
    session.add(
        AuditRow(id=new_id("audit_"), key_id=caller.key_id, action=action, target=target, before=before, after=after)
    )
    session.flush()


def record_of_host(session: Session, key_id: str, action: str, *, after: Facts) -> None:
    """Note what was done to a key by a command on the host, which acts without one: the entry names the key itself."""
    entry = AuditRow(id=new_id("audit_"), key_id=key_id, action=action, target=key_id, after={**after, "by": "host"})
    session.add(entry)
    session.flush()


def page(
    session: Session, *, after: str | None, limit: int, target: str | None = None
) -> tuple[Sequence[AuditRow], bool]:
    """Newest first, and whether more follow."""
    query = select(AuditRow)
    if target is not None:
        query = query.where(AuditRow.target == target)
    return paging.page(session, query, AuditRow.id, after=after, limit=limit, what="entry")
