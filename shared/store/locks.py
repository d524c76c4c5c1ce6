"""Advisory locks: transactions take turns by a name, where no row represents the thing that they share."""

from __future__ import annotations

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session


def one_at_a_time(session: Session, what: str) -> None:
    """Serialise transactions that name the same `what`, until this one ends."""
    session.execute(select(turn(what)))


def turn(what: ColumnElement[str] | str) -> ColumnElement[None]:
    """`one_at_a_time` as a column, for a statement that has more to say."""
    return func.pg_advisory_xact_lock(_key(what))


def is_alone(session: Session, what: str) -> bool:
    """Whether no other transaction has the turn of `what`; if so, this one has it until its end. Never waits."""
    return session.scalar(select(func.pg_try_advisory_xact_lock(_key(what)))) is True


def _key(what: ColumnElement[str] | str) -> ColumnElement[int]:
    return func.hashtextextended(what, 0)
