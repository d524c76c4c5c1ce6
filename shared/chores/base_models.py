"""Verbs of base models that are looked up: who asks, and what a worker found. A look-up is a lease (shared/lease).

A row that a worker has answered once keeps its answer: what is looked up again stays in use meanwhile, and afterwards
whatever the second look says. The commit of a hub's row never changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

from sqlalchemy import case, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.contract.spec import BaseModelRef
from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Work
from shared.lease.values import Lease
from shared.settings import Settings
from shared.settle.catalogue import Catalogue, load_catalogue
from shared.settle.wanted_models import HubAnswer, PendingEntry, Source
from shared.store.tables import AddedModelRow, BaseModelRow

# What a hub has refused it may give later: an administrator accepted its terms, or a token is there.
ASKED_AGAIN_SECONDS: Final = 300.0
_FIRST_PAUSE_SECONDS: Final = 5.0
OWNER: Final = "organization"

LOOK_UP: Final = Kind(
    name="base_model",
    row=BaseModelRow,
    open=BaseModelRow.state == "resolving",
    lost={
        "state": "error",
        "error": f"Looking it up ended {MAX_FAILURES} workers. See the workers' logs.",
        "updated_at": func.now(),
    },
    # What an earlier look has found stays in use.
    cancelled={
        "state": case((BaseModelRow.config.is_not(None), "ready"), else_="error"),
        "error": "The look-up was cancelled. Ask again with `tunepool models check`.",
        "updated_at": func.now(),
    },
)
WORK: Final = Work(LOOK_UP)


@dataclass(frozen=True, slots=True)
class LookUp:
    """The right to say what a hub has at `revision` of the repository `locator`, or what the folder `locator` holds."""

    lease: Lease
    name: str  # of an entry of the catalogue that asked
    source: Source
    locator: str
    revision: str  # the commit, where it is known from an earlier look
    known: bool  # jobs may use what an earlier look has found


def offered(session: Session, settings: Settings) -> Catalogue:
    """The catalogue as it stands now: `models.toml`, what routes have added, and what the workers have found of them.

    An entry that nobody has asked for yet is asked for.
    """
    rows = session.scalars(select(AddedModelRow).order_by(AddedModelRow.created_at, AddedModelRow.name))
    catalogue = load_catalogue(settings).with_added([(pending(row), row.aliases) for row in rows])
    return catalogue.with_answers(ask(session, catalogue.pending.values())) if catalogue.pending else catalogue


def usable(settings: Settings, name: str) -> BaseModelRef | None:
    """The entry of `models.toml` of that name or alias, if nothing has to be looked up. The file wins by name."""
    catalogue = load_catalogue(settings)
    entry = catalogue.entries.get(catalogue.aliases.get(name, name))
    return None if entry is None else entry.ref


def pending(row: AddedModelRow) -> PendingEntry:
    """An entry that a route has added, before anything is known of it."""
    return PendingEntry(
        row.name,
        row.locator,
        row.revision,
        owned_by=OWNER,
        public_name=row.locator if row.source == "hub" else row.name,
        source=cast("Source", row.source),
        created=int(row.created_at.timestamp()),
    )


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
    values = {"id": entry.key, "name": entry.name, "source": entry.source, "locator": entry.locator}
    asked = insert(BaseModelRow).values(**values, revision=entry.revision, state="resolving")
    session.execute(asked.on_conflict_do_nothing())


def _reopen(session: Session, keys: Collection[str]) -> None:
    """Have refused rows looked up again, once their answer is old. Meanwhile a note says so."""
    old = BaseModelRow.updated_at < func.now() - timedelta(seconds=ASKED_AGAIN_SECONDS)
    refused = (BaseModelRow.id.in_(keys), BaseModelRow.state == "error", old)
    session.execute(
        update(BaseModelRow)
        .where(*refused)
        .values(state="resolving", failures=0, updated_at=func.now())
        .execution_options(synchronize_session=False)
    )


def look_again(session: Session, key: str) -> None:
    """Have a row looked up now, whatever was found before. A look-up that goes on goes on."""
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == key, BaseModelRow.lease_owner.is_(None))
        .values(state="resolving", failures=0, lease_until=None, updated_at=func.now())
        .execution_options(synchronize_session=False)
    )


def _answer(row: BaseModelRow) -> HubAnswer:
    error, at = row.error or "", int(row.updated_at.timestamp())
    if row.config is not None:
        return HubAnswer(
            commit=row.commit,
            config=row.config,
            note=error,
            weights=row.weights,
            looked_at=at,
            description=row.description,
        )
    return HubAnswer(refused=error, looked_at=at) if row.state == "error" else HubAnswer(note=error)


def claim(
    session: Session, *, worker_id: str, lease_seconds: float, passed_over: Collection[str] = ()
) -> LookUp | None:
    """Lease the next look-up that is due, or None."""
    row = leasing.take(session, LOOK_UP, worker_id=worker_id, lease_seconds=lease_seconds, passed_over=passed_over)
    if row is None:
        return None
    return LookUp(
        lease=LOOK_UP.lease(row),
        name=row.name,
        source=row.source,
        locator=row.locator,
        revision=row.commit or row.revision,
        known=row.config is not None,
    )


def resolved(
    session: Session,
    lease: Lease,
    *,
    commit: str | None,
    config: str,
    weights: dict[str, Any] | None = None,
    description: dict[str, Any] | None = None,
) -> bool:
    """resolving -> ready. A folder has no commit. False: the lease is lost."""
    values = {"commit": commit, "config": config, "weights": weights, "description": description, "error": None}
    return leasing.end(session, LOOK_UP, lease, state="ready", updated_at=func.now(), **values)


def refused(session: Session, lease: Lease, *, error: str, known: bool = False) -> bool:
    """resolving -> error, with a sentence that says what people can do. False: the lease is lost.

    Args:
        known: an earlier look has found it. It stays ready then: jobs that run must not lose it.
    """
    state = "ready" if known else "error"
    return leasing.end(session, LOOK_UP, lease, state=state, error=error, updated_at=func.now())


def unheard(session: Session, lease: Lease, *, error: str) -> bool:
    """The hub did not answer: it is asked again, after ever longer pauses. False: the lease is lost."""
    seconds = min(ASKED_AGAIN_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(lease.fence - 1, 10))
    return leasing.postpone(session, LOOK_UP, lease, seconds=seconds, error=error, updated_at=func.now())
