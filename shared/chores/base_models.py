"""Verbs of a hub's base models: who asks for which, and what a worker found. A look-up is a lease (shared/lease)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Work
from shared.lease.values import Lease
from shared.settings import Settings
from shared.settle.catalogue import Catalogue, HubAnswer, PendingEntry, load_catalogue
from shared.store.tables import BaseModelRow

# What a hub has refused it may give later: an administrator accepted its terms, or a token is there.
ASKED_AGAIN_SECONDS: Final = 300.0
_FIRST_PAUSE_SECONDS: Final = 5.0

LOOK_UP: Final = Kind(
    name="base_model",
    row=BaseModelRow,
    open=BaseModelRow.state == "resolving",
    lost={
        "state": "error",
        "error": f"Looking it up ended {MAX_FAILURES} workers. See the workers' logs.",
        "updated_at": func.now(),
    },
)
WORK: Final = Work(LOOK_UP)


@dataclass(frozen=True, slots=True)
class LookUp:
    """The right to say what a hub has at `revision` of the repository `locator`."""

    lease: Lease
    name: str  # of an entry of the catalogue that asked
    locator: str
    revision: str


def offered(session: Session, settings: Settings) -> Catalogue:
    """The catalogue as it stands now: `models.toml`, and what the workers have found of its hub's entries.

    An entry that nobody has asked for yet is asked for. Postgres is not asked when no entry needs it.
    """
    found = load_catalogue(settings)
    return found.with_answers(ask(session, found.pending.values())) if found.pending else found


def ask(session: Session, entries: Iterable[PendingEntry]) -> dict[str, HubAnswer]:
    """What is known of each entry, by its key. Has a worker look up what is new, or was refused a while ago."""
    wanted = {entry.key: entry for entry in entries}
    rows = {row.id: row for row in session.scalars(select(BaseModelRow).where(BaseModelRow.id.in_(wanted)))}
    for key in wanted.keys() - rows.keys():
        _insert(session, wanted[key])
    if any(row.state == "error" for row in rows.values()):
        _reopen(session, wanted)
    return {key: _answer(row) for key, row in rows.items()}


def _insert(session: Session, entry: PendingEntry) -> None:
    values = {"id": entry.key, "name": entry.name, "source": "hub", "locator": entry.repository}
    asked = insert(BaseModelRow).values(**values, revision=entry.revision, state="resolving")
    session.execute(asked.on_conflict_do_nothing())


def _reopen(session: Session, keys: Collection[str]) -> None:
    """Have refused rows looked up again, once their answer is old. Meanwhile it is told as a note."""
    old = BaseModelRow.updated_at < func.now() - timedelta(seconds=ASKED_AGAIN_SECONDS)
    refused = (BaseModelRow.id.in_(keys), BaseModelRow.state == "error", old)
    session.execute(
        update(BaseModelRow)
        .where(*refused)
        .values(state="resolving", failures=0, updated_at=func.now())
        .execution_options(synchronize_session=False)
    )


def _answer(row: BaseModelRow) -> HubAnswer:
    if row.state == "ready":
        return HubAnswer(commit=row.commit, config=row.config)
    return HubAnswer(refused=row.error or "") if row.state == "error" else HubAnswer(note=row.error or "")


def claim(
    session: Session, *, worker_id: str, lease_seconds: float, passed_over: Collection[str] = ()
) -> LookUp | None:
    """Lease the next look-up that is due, or None."""
    row = leasing.take(session, LOOK_UP, worker_id=worker_id, lease_seconds=lease_seconds, passed_over=passed_over)
    if row is None:
        return None
    return LookUp(lease=LOOK_UP.lease(row), name=row.name, locator=row.locator, revision=row.revision)


def found(session: Session, lease: Lease, *, commit: str, config: str) -> bool:
    """resolving -> ready. False: the lease is lost."""
    values = {"commit": commit, "config": config, "error": None}
    return leasing.end(session, LOOK_UP, lease, state="ready", updated_at=func.now(), **values)


def refused(session: Session, lease: Lease, *, error: str) -> bool:
    """resolving -> error, with a sentence that says what people can do. False: the lease is lost."""
    return leasing.end(session, LOOK_UP, lease, state="error", error=error, updated_at=func.now())


def unheard(session: Session, lease: Lease, *, error: str) -> bool:
    """The hub did not answer: it is asked again, after ever longer pauses. False: the lease is lost."""
    seconds = min(ASKED_AGAIN_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(lease.fence - 1, 10))
    return leasing.postpone(session, LOOK_UP, lease, seconds=seconds, error=error, updated_at=func.now())
