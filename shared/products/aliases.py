"""Aliases of tuned models, such as `support-bot@prod`: what each of them names now. The moves are in promotion.py.

A name of a base model that `models add --alias` made is another thing: it belongs to the installation's catalogue, has
no `@`, and has no history.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid, NotFound
from shared.store import paging
from shared.store.tables import AliasRow, AliasVersionRow

# No name of a base model may hold an @, and no `ft:` name does.
SIGN: Final = "@"
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_NAME: Final = re.compile(rf"{_PART}@{_PART}")


def must_be_name(name: str) -> None:
    """Raises Invalid unless `name` could be an alias's."""
    if _NAME.fullmatch(name) is None:
        raise Invalid(
            f"'{name[:200]}' is no name of an alias. It has two parts of up to 64 letters, digits, '_', '.' and '-' "
            "with an @ between them, for instance support-bot@prod.",
            param="alias",
        )


def resolved(session: Session, name: str, *, project_id: str) -> str:
    """The id of the model that an alias names now; any other name as it is. The one place that resolves.

    Whoever calls it keeps the answer: a request that runs does not follow an alias that moves. Raises NotFound.
    """
    if SIGN not in name:
        return name
    model_id = session.scalar(
        select(AliasRow.model_id).where(
            AliasRow.project_id == project_id, AliasRow.name == name, AliasRow.deleted_at.is_(None)
        )
    )
    if model_id is None:
        raise NotFound(
            f"The alias '{name[:200]}' does not exist in this project. GET /v1/tunepool/aliases lists its aliases.",
            param="model",
            code="model_not_found",
        )
    return model_id


def standing(session: Session, name: str, *, project_id: str) -> AliasRow | None:
    """The alias of that name that names something now."""
    return session.scalars(
        select(AliasRow).where(
            AliasRow.project_id == project_id,
            AliasRow.name == name,
            AliasRow.deleted_at.is_(None),
            AliasRow.version > 0,
        )
    ).one_or_none()


def find(session: Session, name: str, *, project_id: str) -> AliasRow:
    """Raises Invalid, NotFound."""
    must_be_name(name)
    row = standing(session, name, project_id=project_id)
    if row is None:
        raise NotFound(f"The alias '{name[:200]}' does not exist in this project.", param="alias")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[AliasRow], bool]:
    """The aliases of a project by name, and whether more follow."""
    query = select(AliasRow).where(
        AliasRow.project_id == project_id, AliasRow.deleted_at.is_(None), AliasRow.version > 0
    )
    return paging.page(session, query, AliasRow.name, after=after, limit=limit, order="asc")


def history(session: Session, alias: AliasRow, *, limit: int = 100) -> Sequence[AliasVersionRow]:
    """The versions of an alias, the newest first."""
    query = select(AliasVersionRow).where(AliasVersionRow.alias_id == alias.id)
    return session.scalars(query.order_by(AliasVersionRow.number.desc()).limit(limit)).all()


def version(session: Session, alias: AliasRow, number: int) -> AliasVersionRow:
    """Raises NotFound."""
    row = session.scalars(
        select(AliasVersionRow).where(AliasVersionRow.alias_id == alias.id, AliasVersionRow.number == number)
    ).one_or_none()
    if row is None:
        raise NotFound(f"{alias.name} has no version {number}; its newest is {alias.version}.", param="version")
    return row


def refuse_needed(session: Session, model_id: str, *, name: str) -> None:
    """Raises Conflict if an alias names this model, or would name it after a rollback."""
    needed = session.scalars(
        select(AliasRow.name)
        .where((AliasRow.model_id == model_id) | (AliasRow.fallback_id == model_id), AliasRow.deleted_at.is_(None))
        .order_by(AliasRow.name)
        .limit(1)
    ).one_or_none()
    if needed is not None:
        raise Conflict(
            f"'{name}' is needed by the alias {needed}: it names this model, or would after a rollback. Move the "
            f"alias, or remove it with DELETE /v1/tunepool/aliases/{needed}.",
            param="model",
            code="model_in_use_by_alias",
        )


def refuse_base_needed(session: Session, base_model: str) -> None:
    """Raises Conflict if an alias names a model that was trained on this base."""
    needed = session.scalars(
        select(AliasRow.name)
        .join(AliasVersionRow, (AliasVersionRow.alias_id == AliasRow.id) & (AliasVersionRow.number == AliasRow.version))
        .where(AliasVersionRow.base_model == base_model, AliasRow.deleted_at.is_(None))
        .order_by(AliasRow.name)
        .limit(1)
    ).one_or_none()
    if needed is not None:
        raise Conflict(
            f"The alias {needed} names a model on '{base_model}'. Move or remove the alias first.",
            param="name",
            code="base_model_in_use",
        )
