"""Promotions that wait for approvals, as rows: asked for, listed, ended. Their moves are in shared/operating."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, Literal

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import LimitReached, NotFound
from shared.ids import new_id
from shared.store import paging
from shared.store.tables import AliasRow, ApiKeyRow, ApprovalRow, PromotionRow

LIFE: Final = timedelta(days=7)
MAX_PENDING: Final = 50  # of an alias

End = Literal["moved", "withdrawn", "expired", "overtaken", "refused"]


def ask(session: Session, alias: AliasRow, **values: Any) -> tuple[PromotionRow, bool]:
    """(the request, whether it is new). Who asks again for the same model is answered with the one that waits.

    Args:
        values: columns of the row.

    Raises:
        LimitReached: the alias has `MAX_PENDING`.
    """
    lock_alias(session, alias.id)
    waiting = {row.model_id: row for row in pending_of(session, alias.id)}
    earlier = waiting.get(values["model_id"])
    if earlier is not None and earlier.expires_at > session.scalars(select(func.now())).one():
        return earlier, False
    if earlier is not None:
        end(session, earlier, "expired")
    elif len(waiting) >= MAX_PENDING:
        raise LimitReached(
            f"{alias.name} has {MAX_PENDING} promotions that wait for approvals; withdraw some.",
            param="alias",
            code="too_many_promotions",
        )
    row = PromotionRow(id=new_id("promo_"), project_id=alias.project_id, alias_id=alias.id, **values)
    row.expires_at = func.now() + LIFE  # by the clock that will call it expired
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, True


def lock_alias(session: Session, alias_id: str) -> AliasRow:
    """Whoever changes promotions of an alias holds its row first: all in one order."""
    query = select(AliasRow).where(AliasRow.id == alias_id).with_for_update()
    return session.scalars(query.execution_options(populate_existing=True)).one()


def pending_of(session: Session, alias_id: str) -> Sequence[PromotionRow]:
    """Those that wait, oldest first."""
    query = select(PromotionRow).where(PromotionRow.alias_id == alias_id, PromotionRow.state == "pending")
    return session.scalars(query.order_by(PromotionRow.id)).all()


def find(session: Session, promotion_id: str, *, project_id: str) -> tuple[PromotionRow, AliasRow]:
    """A promotion of this project and its alias. Raises NotFound."""
    pair = session.execute(
        select(PromotionRow, AliasRow)
        .join(AliasRow, AliasRow.id == PromotionRow.alias_id)
        .where(PromotionRow.id == promotion_id, PromotionRow.project_id == project_id)
    ).one_or_none()
    if pair is None:
        raise NotFound(f"No promotion '{promotion_id[:100]}' in this project.", param="promotion_id")
    return pair[0], pair[1]


def held(session: Session, promotion_id: str, *, project_id: str) -> tuple[PromotionRow, AliasRow]:
    """The same with both rows' locks, as they are by then. Raises NotFound."""
    row, alias = find(session, promotion_id, project_id=project_id)
    alias = lock_alias(session, alias.id)
    session.refresh(row, with_for_update=True)
    return row, alias


def page(
    session: Session, *, project_id: str, state: str | None, after: str | None, limit: int
) -> tuple[Sequence[tuple[PromotionRow, AliasRow]], bool]:
    """Promotions of a project with their aliases, newest first, and whether more follow. Raises NotFound: `after`."""
    mine = PromotionRow.project_id == project_id
    paging.must_have_been(session, PromotionRow.id, after, mine, what="promotion")
    query = select(PromotionRow, AliasRow).join(AliasRow, AliasRow.id == PromotionRow.alias_id).where(mine)
    if state is not None:
        query = query.where(PromotionRow.state == state)
    rows = session.execute(paging.behind(query, PromotionRow.id, after=after, limit=limit))
    return paging.cut([(row, alias) for row, alias in rows], limit)


def approve(session: Session, row: PromotionRow, *, key_id: str) -> bool:
    """Add a key's consent. False: it was there."""
    added = session.scalars(
        insert(ApprovalRow)
        .values(promotion_id=row.id, key_id=key_id)
        .on_conflict_do_nothing()
        .returning(ApprovalRow.key_id)
    ).one_or_none()
    return added is not None


def approvals(session: Session, row: PromotionRow) -> list[str]:
    """Ids of the keys that have consented, first ones first; not of those that have ended since."""
    query = select(ApprovalRow.key_id).join(ApiKeyRow, ApiKeyRow.id == ApprovalRow.key_id)
    live = ApiKeyRow.revoked_at.is_(None) & (ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > func.now()))
    mine = query.where(ApprovalRow.promotion_id == row.id, live)
    return list(session.scalars(mine.order_by(ApprovalRow.created_at, ApprovalRow.key_id)))


def end(
    session: Session,
    row: PromotionRow,
    state: End,
    *,
    by: str | None = None,
    outcome: str | None = None,
    code: str | None = None,
    version: int | None = None,
) -> None:
    """It waits no more. `outcome`, `code`: why nothing moved; `by`: whose key ended it."""
    values = {"state": state, "ended_by": by, "outcome": outcome, "code": code, "version": version}
    session.execute(update(PromotionRow).where(PromotionRow.id == row.id).values(**values, ended_at=func.now()))
    session.refresh(row)


def overdue(session: Session, *, limit: int = 100) -> Sequence[str]:
    """Ids of those that nobody has approved in time."""
    late = PromotionRow.expires_at < func.now()
    query = select(PromotionRow.id).where(PromotionRow.state == "pending", late)
    return session.scalars(query.limit(limit)).all()
