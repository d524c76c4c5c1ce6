"""The catalogue's entries that administrators add and remove while everything runs. Each act is audited."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.chores.preflights import OPEN
from shared.errors import Conflict
from shared.products import aliases
from shared.settings import Settings
from shared.settle.base_model_status import BaseModelStatus, standing
from shared.settle.catalogue import Catalogue
from shared.settle.wanted_models import WantedModel
from shared.store.lifecycle import UNFINISHED
from shared.store.locks import one_at_a_time
from shared.store.tables import AddedModelRow, BaseModelRow, ExportRow, FetchRow, JobRow, MergeRow, PreflightRow
from shared.tenants import audit
from shared.tenants.keys import Caller

_TURN: Final = "catalogue"  # two additions of one name at once take turns
_SHOWN: Final = 3  # users of a model that a refusal names


def add(session: Session, caller: Caller, wanted: WantedModel, settings: Settings) -> BaseModelStatus:
    """A new entry, which a worker then looks up. Raises Conflict when a name in it is taken."""
    one_at_a_time(session, _TURN)
    _refuse_taken(base_models.offered(session, settings), wanted)
    row = AddedModelRow(
        name=wanted.name,
        source=wanted.source,
        locator=wanted.locator,
        revision=wanted.revision,
        aliases=list(wanted.aliases),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    key = base_models.pending(row).key
    if session.scalar(select(BaseModelRow.state).where(BaseModelRow.id == key)) == "error":
        base_models.look_again(session, key)  # of another entry's row
    audit.record(session, caller, "base_model.add", row.name, after=_facts(row))
    return standing(base_models.offered(session, settings), row.name)


def _refuse_taken(catalogue: Catalogue, wanted: WantedModel) -> None:
    for param, name in (("name", wanted.name), *(("aliases", alias) for alias in wanted.aliases)):
        if catalogue.taken(name):
            raise Conflict(
                f"The catalogue has '{name}' already{_as_what(catalogue, name)}. Choose another name, or remove that "
                "one first.",
                param=param,
                code="base_model_exists",
            )


def _as_what(catalogue: Catalogue, name: str) -> str:
    target = catalogue.aliases.get(name)
    return "" if target is None else f", as an alias of '{target}'"


def look_again(session: Session, caller: Caller, name: str, settings: Settings) -> BaseModelStatus:
    """Have a worker look up the entry of that name or alias once more. What reads no hub and no folder stays as it is.

    Raises NotFound.
    """
    catalogue = base_models.offered(session, settings)
    shown = standing(catalogue, name)
    asked = catalogue.asked.get(shown.name)
    if asked is None:
        return shown
    base_models.look_again(session, asked.key)
    audit.record(session, caller, "base_model.check", shown.name, before={"state": shown.state})
    session.expire_all()
    return standing(base_models.offered(session, settings), shown.name)


def remove(session: Session, caller: Caller, name: str, settings: Settings) -> None:
    """Take an entry out of the catalogue; the last entry that names it takes along what workers have found.

    Raises:
        NotFound: there is none.
        Conflict: it is an alias, an entry of the file or built in, or jobs, merges, preflights or aliases use it.
    """
    one_at_a_time(session, _TURN)
    catalogue = base_models.offered(session, settings)
    shown = standing(catalogue, name)
    if name != shown.name:
        raise Conflict(f"'{name}' is another name of '{shown.name}'. Remove that one.", param="name")
    if shown.origin != "added":
        where = "built in" if shown.origin == "built_in" else "an entry of models.toml; take it out of that file"
        raise Conflict(f"'{name}' cannot be removed here: it is {where}.", param="name", code="base_model_not_added")
    _refuse_used(session, name)
    aliases.refuse_base_needed(session, name)
    row = session.get_one(AddedModelRow, name)
    key, before = base_models.pending(row).key, _facts(row)
    session.delete(row)
    session.execute(delete(FetchRow).where(FetchRow.model == name))
    session.flush()
    if key not in {entry.key for entry in base_models.offered(session, settings).asked.values()}:
        # Whoever looks it up at this moment finds its lease gone, and writes nothing.
        session.execute(delete(BaseModelRow).where(BaseModelRow.id == key))
    audit.record(session, caller, "base_model.remove", name, before=before)


def _refuse_used(session: Session, name: str) -> None:
    unfinished = (
        (JobRow, JobRow.status.in_(UNFINISHED)),
        (MergeRow, MergeRow.status.in_(OPEN)),
        (ExportRow, ExportRow.status.in_(OPEN)),
        (PreflightRow, PreflightRow.status.in_(OPEN)),
    )
    users: list[str] = []
    for kind, open_still in unfinished:
        mine = select(kind.id).where(kind.base_model == name, open_still).order_by(kind.id).limit(_SHOWN + 1)
        users += session.scalars(mine)
    if users:
        others = " and others" if len(users) > _SHOWN else ""
        raise Conflict(
            f"'{name}' is in use by {', '.join(users[:_SHOWN])}{others}. Wait until they have ended, or cancel them.",
            param="name",
            code="base_model_in_use",
        )


def _facts(row: AddedModelRow) -> dict[str, Any]:
    return {
        "source": row.source,
        "locator": row.locator,
        "revision": row.revision or None,
        "aliases": row.aliases,
    }
