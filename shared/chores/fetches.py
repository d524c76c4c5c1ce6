"""Verbs of prefetches: each worker of a pool brings a base model to its host before a job needs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Unpack

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.errors import Conflict, Invalid
from shared.fleet.workers import SILENCE
from shared.lease import lease as leasing
from shared.lease import turns
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Claiming, Work
from shared.lease.values import Lease
from shared.settings import Settings
from shared.settle.base_model_status import standing
from shared.store.tables import DeviceRow, FetchRow, WorkerRow
from shared.tenants import audit
from shared.tenants.keys import Caller

_RETRY_SECONDS: Final = 30.0
# After so long a host is asked again that could not have the model, or that has removed it since.
_AGAIN_SECONDS: Final = {"error": 300.0, "done": 60.0}

# A worker that is silent or drains takes nothing, and nobody else takes its rows: no bell is rung for them.
_ALIVE: Final = FetchRow.worker_id.in_(
    select(WorkerRow.id).where(WorkerRow.last_seen > func.now() - SILENCE, WorkerRow.draining.is_(False))
)
FETCH: Final = Kind(
    name="fetch",
    row=FetchRow,
    open=FetchRow.state.in_(["waiting", "fetching"]),
    lost={
        "state": "error",
        "error": f"Fetching it ended the worker {MAX_FAILURES} times. See the worker's log.",
        "updated_at": func.now(),
    },
    ready=_ALIVE,
    cancelled={"state": "error", "error": "It was cancelled.", "updated_at": func.now()},
    taken={"state": "fetching"},
    waiting={"state": "waiting"},
)
WORK: Final = Work(FETCH, long=True)


@dataclass(frozen=True, slots=True)
class Fetch:
    """The right to bring a base model to one's host."""

    lease: Lease
    project_id: str
    model: str


def ask(session: Session, caller: Caller, name: str, settings: Settings) -> None:
    """Have every worker of the pool that has devices fetch the model, if its host lacks it. Again: once more.

    Raises:
        NotFound, NotYet, Invalid: there is no such base model, or it cannot be used yet, or at all.
        Conflict: it lies in a folder, or no worker of the pool is alive.
    """
    base = base_models.offered(session, settings).find(name)
    if base.source == "path":
        raise Invalid(f"'{name}' lies in a folder on each host: there is nothing to fetch.", param="name")
    workers = session.scalars(
        select(WorkerRow.id).where(
            WorkerRow.pool == settings.pool,
            WorkerRow.last_seen > func.now() - SILENCE,
            select(DeviceRow.id).where(DeviceRow.worker_id == WorkerRow.id).exists(),
        )
    ).all()
    if not workers:
        raise Conflict(f"No worker of the pool '{settings.pool}' is alive; start one.", code="no_worker")
    session.execute(delete(FetchRow).where(FetchRow.worker_id.not_in(select(WorkerRow.id))))
    for worker_id in workers:
        _put(session, worker_id, base.name, base.revision, FetchRow.lease_owner.is_(None))
    audit.record(session, caller, "base_model.prefetch", base.name, after={"workers": list(workers)})


def put(session: Session, worker_id: str, model: str, revision: str, *, at_once: bool = False) -> bool:
    """Have a worker fetch a model for jobs that wait. False: it is at it, or its last answer still holds.

    Args:
        at_once: ask again whatever it has answered.
    """
    old = [
        (FetchRow.state == state) & (FetchRow.updated_at < func.now() - timedelta(seconds=seconds))
        for state, seconds in _AGAIN_SECONDS.items()
    ]
    over = FetchRow.state.in_(_AGAIN_SECONDS) if at_once else or_(*old)
    return _put(session, worker_id, model, revision, FetchRow.lease_owner.is_(None) & over)


def _put(session: Session, worker_id: str, model: str, revision: str, again: ColumnElement[bool]) -> bool:
    key = hashlib.sha256(f"{worker_id}\0{model}\0{revision}".encode()).hexdigest()[:32]
    fresh = {"state": "waiting", "failures": 0, "error": None, "code": None, "lease_until": None}
    wanted = {"id": f"fetch_{key}", "worker_id": worker_id, "model": model, "revision": revision}
    asked = insert(FetchRow).values(**wanted, state="waiting")
    fresh_row = asked.on_conflict_do_update(
        index_elements=["id"], set_=fresh | {"updated_at": func.now()}, where=again
    ).returning(FetchRow.id)
    return session.execute(fresh_row).one_or_none() is not None


def listed(session: Session, name: str, settings: Settings) -> Sequence[tuple[FetchRow, str]]:
    """The prefetches of a base model (or an alias) as it is pinned, each with its worker's host. Raises NotFound."""
    model = standing(base_models.offered(session, settings), name)
    rows = session.execute(
        select(FetchRow, WorkerRow.host)
        .join(WorkerRow, WorkerRow.id == FetchRow.worker_id)
        .where(FetchRow.model == model.name, FetchRow.revision == (model.commit or ""))
        .order_by(WorkerRow.host, FetchRow.id)
    )
    return [(row, host) for row, host in rows]


def claim(session: Session, **claiming: Unpack[Claiming]) -> Fetch | None:
    """Lease the worker's next prefetch, or None."""
    row = turns.take(session, FETCH, where=(FetchRow.worker_id == claiming["worker_id"],), **claiming)
    return None if row is None else Fetch(lease=FETCH.lease(row), project_id=row.project_id, model=row.model)


def tell(session: Session, lease: Lease, *, done: int, total: int) -> bool:
    """Note how far it is, in bytes. False: the lease is lost."""
    return leasing.write(
        session, FETCH, lease, bytes_done=min(done, total), bytes_total=total, error=None, updated_at=func.now()
    )


def finish(session: Session, lease: Lease, *, size: int) -> bool:
    """The host has the model, of `size` bytes. False: the lease is lost."""
    values = {"bytes_done": size, "bytes_total": size, "error": None, "updated_at": func.now()}
    return leasing.end(session, FETCH, lease, state="done", **values)


def fail(session: Session, lease: Lease, *, error: str, code: str) -> bool:
    """Only people can mend it. False: the lease is lost."""
    return leasing.end(session, FETCH, lease, state="error", error=error, code=code, updated_at=func.now())


def try_again(session: Session, lease: Lease, *, error: str) -> bool:
    """Its source was away: once more in a while, and the last try ends it. False: the lease is lost."""
    last = {"state": "error", "error": error, "updated_at": func.now()}
    return leasing.postpone(
        session, FETCH, lease, seconds=_RETRY_SECONDS, counted=True, last=last, error=error, updated_at=func.now()
    )
