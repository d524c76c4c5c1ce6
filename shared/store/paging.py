"""A page of a list: the rows behind `after`, and whether more follow. Decided here for every list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.errors import NotFound

Order = Literal["asc", "desc"]
Row = TypeVar("Row")
Query = TypeVar("Query", bound=Select[*tuple[Any, ...]])


def page(
    session: Session,
    query: Select[Row],
    key: InstrumentedAttribute[Any],
    *listed: ColumnElement[bool],
    after: str | None,
    limit: int,
    order: Order = "desc",
    what: str | None = None,
) -> tuple[Sequence[Row], bool]:
    """At most `limit` rows of a query by its key, newest first by default, and whether more follow.

    Args:
        key: The column that orders the list, as a rule an id: ids sort by time.
        listed: What the list is about, for instance a project. It narrows the query, and `after` must be of it.
        after: The key of the last row of the page before. That row may be deleted by now.
        what: A noun for a row. With it, an `after` that was never in the list raises NotFound; without it, any place
            in the order will do: for lists by name, and for rows that really go when they are deleted.
    """
    must_have_been(session, key, after, *listed, what=what)
    return cut(session.scalars(behind(query.where(*listed), key, after=after, limit=limit, order=order)).all(), limit)


def behind(
    query: Query, key: InstrumentedAttribute[Any], *, after: str | None, limit: int, order: Order = "desc"
) -> Query:
    """The query of a page, which asks for one row more than the page holds."""
    if after is not None:
        query = query.where(key < after if order == "desc" else key > after)
    return query.order_by(key.desc() if order == "desc" else key.asc()).limit(limit + 1)


def cut(rows: Sequence[Row], limit: int) -> tuple[Sequence[Row], bool]:
    """The rows of a page, and whether the one that was asked for beyond it is there."""
    return rows[:limit], len(rows) > limit


def must_have_been(
    session: Session,
    key: InstrumentedAttribute[Any],
    after: str | None,
    *listed: ColumnElement[bool],
    what: str | None,
) -> None:
    """Raises NotFound for an `after` that no row has, or one of another list; deleted rows keep their ids."""
    if after is None or what is None:
        return
    if session.scalar(select(key).where(key == after, *listed)) is None:
        raise never_was(after, what)


def never_was(after: str, what: str) -> NotFound:
    return NotFound(f"'after' is '{after[:100]}', but this list has no such {what}.", param="after")
