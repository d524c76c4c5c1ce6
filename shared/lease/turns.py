"""Long work in turn: a worker keeps children free for short work, and one project does not hold up the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from sqlalchemy import ColumnElement, func, select, true, union_all
from sqlalchemy.orm import Session

from shared.lease import lease
from shared.lease.lease import Kind
from shared.store.locks import one_at_a_time


@dataclass(frozen=True, slots=True)
class Work:
    """Some of a kind's rows, and whether one takes long (minutes, where a short one takes seconds)."""

    kind: Kind
    long: bool = False
    which: ColumnElement[bool] | None = None  # None: all

    def may_begin(self) -> ColumnElement[bool]:
        """The rows that a worker may take now."""
        return self.kind.may_begin() & self._which

    @property
    def _which(self) -> ColumnElement[bool]:
        return true() if self.which is None else self.which

    def projects_served(self, worker_id: str) -> Any:
        """A query for the projects whose rows `worker_id` holds, one line a row."""
        row = self.kind.row
        return select(row.project_id).where(
            self.kind.open, self._which, row.lease_owner == worker_id, row.lease_until > func.now()
        )


@dataclass(frozen=True, slots=True)
class ChoreTurn:
    """How a worker takes long work: `at_most` rows of all `long` works together, one for each project at a time.

    The next project is the one that follows `after` in the order of ids, round and round.
    """

    long: tuple[Work, ...]
    at_most: int
    after: str = ""


class Claiming(TypedDict):
    """How a worker claims a row of a chore: for how long, in which turn, and not the rows of a newer version."""

    worker_id: str
    lease_seconds: float
    turn: NotRequired[ChoreTurn | None]
    passed_over: NotRequired[Collection[str]]


def take(
    session: Session,
    kind: Kind,
    *,
    worker_id: str,
    turn: ChoreTurn | None = None,
    where: Sequence[ColumnElement[bool]] = (),
    **rest: Any,
) -> Any | None:
    """`lease.take`, in turn over projects when there is a `turn`."""
    if turn is None:
        return lease.take(session, kind, worker_id=worker_id, where=where, **rest)
    one_at_a_time(session, f"chores:{worker_id}")
    served = session.scalars(union_all(*(work.projects_served(worker_id) for work in turn.long))).all()
    if len(served) >= turn.at_most:
        return None
    project = kind.row.project_id
    return lease.take(
        session,
        kind,
        worker_id=worker_id,
        where=(*where, project.not_in(served)),
        order=(project <= turn.after, project),
        **rest,
    )


def take_alone(session: Session, work: Work, *, worker_id: str, **rest: Any) -> Any | None:
    """`take`, for work of which a worker holds one row at a time: each fills its host."""
    one_at_a_time(session, f"{work.kind.name}:{worker_id}")
    if session.scalars(work.projects_served(worker_id).limit(1)).one_or_none() is not None:
        return None
    return take(session, work.kind, worker_id=worker_id, **rest)
