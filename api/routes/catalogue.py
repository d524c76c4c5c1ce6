"""/v1/tunepool/models: the base models of an installation, added and removed while everything runs."""

from __future__ import annotations

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import Administrator, Door, DoorDep, ModelsReader
from api.pool_bodies import AddModel
from api.views import catalogue_views, view
from api.views.catalogue_views import BaseModelPage, BaseModelView, FetchPage
from shared.chores import added_models, fetches
from shared.settle.base_model_status import standing, standings
from shared.settle.wanted_models import wanted_model

router = APIRouter(prefix="/v1/tunepool/models", tags=["base models"])

# A name may be a hub's repository, which has a slash. So routes with more behind the name stand before those without.


@router.post("", response_model=BaseModelView, openapi_extra=body_of(AddModel))
def add_model(caller: Administrator, body: RawBody, door: DoorDep) -> BaseModelView:
    """Add a base model, of a hub or in a folder. Jobs may name it at once; it is usable when its state is ready."""
    asked = parse(body, AddModel)
    wanted = wanted_model(asked.source, revision=asked.revision, name=asked.name, aliases=asked.aliases)
    with door.session() as session:
        made = catalogue_views.base_model(added_models.add(session, caller, wanted, door.settings))
    door.ring("cpu")
    return made


@router.get("", response_model=BaseModelPage)
def list_base_models(door: DoorDep, caller: ModelsReader) -> BaseModelPage:
    """Every base model with its state, also those that cannot be used."""
    catalogue = door.catalogue
    data = [catalogue_views.base_model(standing) for standing in standings(catalogue)]
    return BaseModelPage(data=data, file_problem=catalogue.file_problem or None)


@router.post("/{name:path}/check", response_model=BaseModelView)
def check_base_model(name: str, caller: Administrator, door: DoorDep) -> BaseModelView:
    """Have a worker look at it again, for instance once its terms are accepted. One that is ready stays so."""
    with door.session() as session:
        view = catalogue_views.base_model(added_models.look_again(session, caller, name, door.settings))
    door.ring("cpu")
    return view


@router.post("/{name:path}/prefetch", response_model=FetchPage)
def prefetch_base_model(name: str, caller: Administrator, door: DoorDep) -> FetchPage:
    """Have every worker of the pool bring it to its host, so that no job's device waits for the download."""
    with door.session() as session:
        fetches.ask(session, caller, name, door.settings)
    door.ring("cpu")
    return _fetches(name, door)


@router.get("/{name:path}/prefetch", response_model=FetchPage)
def list_prefetches(name: str, caller: ModelsReader, door: DoorDep) -> FetchPage:
    """How far each worker is with it, in bytes."""
    return _fetches(name, door)


def _fetches(name: str, door: Door) -> FetchPage:
    with door.session() as session:
        return FetchPage(data=[catalogue_views.fetch(*entry) for entry in fetches.listed(session, name, door.settings)])


@router.get("/{name:path}", response_model=BaseModelView)
def retrieve_base_model(name: str, door: DoorDep, caller: ModelsReader) -> BaseModelView:
    """One base model, by its name, an alias, or the repository or folder that it is made of."""
    return catalogue_views.base_model(standing(door.catalogue, name))


@router.delete("/{name:path}", response_model=view.Deleted)
def remove_base_model(name: str, caller: Administrator, door: DoorDep) -> view.Deleted:
    """Take a base model out that was added here. Refused while jobs use it; adapters that were trained on it stay."""
    with door.session() as session:
        added_models.remove(session, caller, name, door.settings)
    return view.Deleted(id=name, object="tunepool.base_model")
