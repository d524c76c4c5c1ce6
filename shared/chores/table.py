"""The CPU lane's work: one row for each chore. `worker.chores.table` says who does it.

A new chore is a row here and a handler there. Its rows are then rung for, kept, reaped and given up like all others.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.chores import (
    base_models,
    deliveries,
    evaluations,
    exports,
    fetches,
    file_checks,
    merges,
    preflights,
    trackings,
)
from shared.jobs.claims import SETTLING
from shared.lease import lease
from shared.lease.lease import Kind
from shared.lease.turns import ChoreTurn, Work
from shared.store.tables import JobRow, Leased

# In the order in which a worker looks for them: what takes seconds comes before what takes minutes.
CHORES: Final[dict[str, Work]] = {
    "settle": SETTLING,
    "file_check": file_checks.LINES,
    "table_check": file_checks.TABLES,
    "base_model": base_models.WORK,
    "delivery": deliveries.WORK,
    "tracking": trackings.WORK,
    "preflight": preflights.WORK,
    "fetch": fetches.WORK,
    "merge": merges.WORK,
    "export": exports.WORK,
    "evaluation": evaluations.WORK,
}


def kinds() -> list[Kind]:
    """The kinds of lease that the chores hold, without jobs: shared/jobs ends those itself."""
    by_name = {work.kind.name: work.kind for work in CHORES.values() if work is not SETTLING}
    return list(by_name.values())


def leased_rows() -> list[type[Leased]]:
    """The tables whose rows a worker may hold: those of the chores, and jobs."""
    return [JobRow, *(kind.row for kind in kinds())]


def turn(*, at_most: int, after: str) -> ChoreTurn:
    """A turn among all long chores."""
    return ChoreTurn(tuple(work for work in CHORES.values() if work.long), at_most=at_most, after=after)


def reap(session: Session, *, grace_seconds: float) -> list[str]:
    """Take back the rows of lost workers, of every kind. Returns their ids."""
    return [row for kind in kinds() for row in lease.reap(session, kind, grace_seconds=grace_seconds)]


def long_work_waits(session: Session) -> bool:
    """Whether long work may begin, for which what can be gone on with later makes room."""
    return any(
        session.scalars(select(work.kind.row.id).where(work.may_begin()).limit(1)).one_or_none() is not None
        for work in CHORES.values()
        if work.long
    )
