"""What a job begins with: the base model of a name, and the tuned model that it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.contract.parent_model import ParentModel
from shared.contract.spec import BaseModelRef
from shared.errors import NotFound
from shared.jobs import parents
from shared.products import adapters
from shared.settings import Settings
from shared.settle import going_on
from shared.settle.catalogue import Catalogue

Sessions = Callable[[], AbstractContextManager[Session]]


def catalogue(sessions: Sessions, settings: Settings) -> Catalogue:
    """Every base model, as it stands now."""
    with sessions() as session:
        return base_models.offered(session, settings)


def base_model(sessions: Sessions, settings: Settings, name: str) -> BaseModelRef:
    """The base model of that name or alias. Raises NotFound, NotYet, Invalid."""
    return base_models.usable(settings, name) or catalogue(sessions, settings).find(name)


def start(
    sessions: Sessions, settings: Settings, name: str, *, project_id: str
) -> tuple[BaseModelRef, ParentModel | None]:
    """The base model that a job trains; and where `name` is a tuned model's, the tuned model that it goes on from.

    Each session commits by itself: a missing base model is looked up from here on, although this answer is that it is
    not there yet.

    Raises NotFound, NotYet, Invalid, and Conflict when the base of a tuned model is gone or another.
    """
    if not adapters.is_tuned(name) or catalogue(sessions, settings).taken(name):
        return base_model(sessions, settings, name), None
    with sessions() as session:
        parent = parents.find(session, name, project_id=project_id)
    try:
        base = base_model(sessions, settings, parent.spec.base_model.name)
    except NotFound:
        base = None
    return going_on.must_stand_on(parent, base), parent
