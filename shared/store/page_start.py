"""`after` of a list: the row that a page begins behind. It may be deleted by now; it must have been there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.errors import NotFound


def must_have_been(
    session: Session, ids: InstrumentedAttribute[Any], after: str | None, *listed: ColumnElement[bool], what: str
) -> None:
    """Raises NotFound for an `after` that no row has, or one of another list; deleted rows keep their ids."""
    if after is not None and session.scalar(select(ids).where(ids == after, *listed)) is None:
        raise NotFound(f"'after' is '{after[:100]}', but this list has no such {what}.", param="after")
