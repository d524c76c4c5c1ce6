"""The one lease: who works on a row, until when, and what becomes of the row when that worker is lost.

Every kind of work has the same columns (`shared.store.tables.Leased`) and is taken, kept and let go by the verbs here.
The fence only grows, so that a late holder's writes match no row. `failures` counts lost workers and failed tries, and
nothing else: a drain or a database that was away costs no try. The database's clock is the only clock.

A free row has no `lease_until`. A postponed one has a `lease_until` and no owner: it is free again at that moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, SQLColumnExpression, func, or_, select, update
from sqlalchemy.orm import Session

from shared.lease.values import Lease, ends_in
from shared.store.tables import Leased

# A row that has used up this many tries is not begun again: it would end the next worker too.
MAX_FAILURES: Final = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of work: which rows it has, and how they are written."""

    name: str
    row: type[Leased]
    open: ColumnElement[bool]  # the row has work left
    lost: Mapping[str, Any]  # the columns that end a row when its tries are used up
    ready: ColumnElement[bool] | None = None  # what else must hold before somebody may begin
    taken: Mapping[str, Any] = field(default_factory=dict)  # columns of a row that somebody works on
    waiting: Mapping[str, Any] = field(default_factory=dict)  # columns of a row that nobody works on
    cancelled: Mapping[str, Any] = field(default_factory=dict)  # the columns that end a row when people want no more

    def may_begin(self) -> ColumnElement[bool]:
        """The rows that a worker may take now."""
        now = self.open & free(self.row)
        return now if self.ready is None else now & self.ready

    def lease(self, row: Leased) -> Lease:
        """The lease under which `row` is held."""
        return Lease(
            kind=self.name, id=row.id, fence=row.fence, worker_id=row.lease_owner or "", attempt=row.failures + 1
        )


def free(row: type[Leased]) -> ColumnElement[bool]:
    """Nobody holds the row, and it is not postponed.

    The version before this one writes no owner into some kinds of rows. Their leases end by time alone, as they did.
    """
    return or_(row.lease_until.is_(None), row.lease_owner.is_(None) & (row.lease_until < func.now()))


def take(
    session: Session,
    kind: Kind,
    *,
    worker_id: str,
    lease_seconds: float,
    passed_over: Collection[str] = (),
    where: Sequence[ColumnElement[bool]] = (),
    order: Sequence[SQLColumnExpression[Any]] = (),
) -> Any | None:
    """Lease the next row that may begin, the oldest unless `order` says otherwise. None: there is none.

    Rows in `passed_over` are left alone: a newer version wrote them.
    """
    row = kind.row
    candidate = (
        select(row.id)
        .where(kind.may_begin(), row.id.not_in(passed_over), *where)
        .order_by(*order, row.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return session.execute(
        update(row)
        .where(row.id == candidate)
        .values(fence=row.fence + 1, lease_owner=worker_id, lease_until=ends_in(lease_seconds), **kind.taken)
        .returning(row)
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()


def keep(session: Session, kind: Kind, lease: Lease, *, lease_seconds: float) -> bool:
    """Extend the lease. False: it is lost, or there is nothing left to do."""
    return write(session, kind, lease, lease_until=ends_in(lease_seconds))


def end(session: Session, kind: Kind, lease: Lease, **values: Any) -> bool:
    """Write the result and let the row go. False: the lease is lost, and nothing is written."""
    return write(session, kind, lease, lease_owner=None, lease_until=None, **values)


def give_back(session: Session, kind: Kind, lease: Lease, *, counted: bool, **values: Any) -> bool:
    """Free the row for another try. With `counted` this one was used up, and the last one ends the row as lost.

    False: the lease is lost, and nothing is written.
    """
    return _let_go(session, kind, lease, counted=counted, until=None, last=kind.lost, values=values)


def postpone(
    session: Session,
    kind: Kind,
    lease: Lease,
    *,
    seconds: float,
    counted: bool = False,
    last: Mapping[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Free the row, but not before `seconds` have passed. `last`: how a counted last try ends it, else as lost."""
    until = func.now() + timedelta(seconds=seconds)
    ending = kind.lost if last is None else last
    return _let_go(session, kind, lease, counted=counted, until=until, last=ending, values=values)


def _let_go(
    session: Session,
    kind: Kind,
    lease: Lease,
    *,
    counted: bool,
    until: ColumnElement[Any] | None,
    last: Mapping[str, Any],
    values: Mapping[str, Any],
) -> bool:
    row = session.scalars(
        select(kind.row).where(*held(kind, lease)).with_for_update().execution_options(populate_existing=True)
    ).one_or_none()
    if row is None:
        return False
    if counted and row.failures + 1 >= MAX_FAILURES:
        return end(session, kind, lease, failures=row.failures + 1, **last)
    failures = row.failures + int(counted)
    return write(session, kind, lease, failures=failures, lease_owner=None, lease_until=until, **kind.waiting, **values)


def cancel(session: Session, kind: Kind, row_id: str) -> Any | None:
    """End a row that has work left, whoever holds it; the holder stops at its next look. None: it has none left."""
    assert kind.cancelled, f"nothing ends a row of {kind.name} early"
    return session.execute(
        update(kind.row)
        .where(kind.row.id == row_id, kind.open)
        .values(lease_owner=None, lease_until=None, **kind.cancelled)
        .returning(kind.row)
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()


def held(kind: Kind, lease: Lease) -> tuple[ColumnElement[bool], ...]:
    """Whether the lease is still its holder's."""
    row = kind.row
    return (
        row.id == lease.id,
        row.fence == lease.fence,
        row.lease_owner == lease.worker_id,
        row.lease_until.is_not(None),
        kind.open,
    )


def write(session: Session, kind: Kind, lease: Lease, **values: Any) -> bool:
    """Write the row under its lease. False: the lease is lost, and nothing is written."""
    updated = session.execute(update(kind.row).where(*held(kind, lease)).values(**values).returning(kind.row.id))
    return updated.one_or_none() is not None


# --- workers that are gone -------------------------------------------------------------------------------------------


def give_up(session: Session, rows: Iterable[type[Leased]], worker_id: str) -> None:
    """End every lease of a worker that has started afresh: the reaper takes them back at its next pass."""
    for row in rows:
        session.execute(
            update(row)
            .where(row.lease_owner == worker_id, row.lease_until.is_not(None))
            .values(lease_until=func.to_timestamp(0))
        )


def dead(row: type[Leased], *, grace_seconds: float) -> tuple[ColumnElement[bool], ...]:
    """Leases whose holder has not been heard for `grace_seconds` after their end."""
    return (row.lease_owner.is_not(None), row.lease_until < func.now() - timedelta(seconds=grace_seconds))


def reap(session: Session, kind: Kind, *, grace_seconds: float, limit: int = 100) -> list[str]:
    """Take back the rows of dead leases; each has cost a try, and the last one ends the row. Returns their ids."""
    rows = session.scalars(
        select(kind.row)
        .where(kind.open, *dead(kind.row, grace_seconds=grace_seconds))
        .order_by(kind.row.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    for row in rows:
        give_back(session, kind, kind.lease(row), counted=True)
    return [row.id for row in rows]
