"""/v1/models: base models of the catalogue, and the project's own adapters."""

from __future__ import annotations

from fastapi import APIRouter

from api import views
from api.deps import Door, DoorDep, ModelsReader, ModelsWriter
from shared.errors import Invalid
from shared.products import adapters
from shared.tenants import audit

router = APIRouter(prefix="/v1/models", tags=["models"])


def _base_models(door: Door) -> list[views.Model]:
    return [views.Model(id=name, created=created, owned_by=owner) for name, created, owner in door.catalogue.listed()]


@router.get("", response_model=views.ModelPage)
def list_models(door: DoorDep, caller: ModelsReader) -> views.ModelPage:
    """Everything `model` may name: base models, then the project's adapters."""
    with door.session() as session:
        rows, _ = adapters.page(session, project_id=caller.project_id, after=None, limit=10_000)
    return views.ModelPage(
        data=[
            *_base_models(door),
            *(views.model(adapters.published(row), owner=caller.organization_name) for row in rows),
        ]
    )


@router.get("/{model:path}", response_model=views.Model)
def retrieve_model(model: str, door: DoorDep, caller: ModelsReader) -> views.Model:
    """A base model, an adapter or a checkpoint."""
    known = next((one for one in _base_models(door) if one.id == model), None)
    if known is not None:
        return known
    door.catalogue.must_be_usable(model)
    with door.session() as session:
        found = adapters.find_published(session, model, project_id=caller.project_id)
    return views.model(found, owner=caller.organization_name)


@router.delete("/{model:path}", response_model=views.Deleted)
def delete_model(model: str, door: DoorDep, caller: ModelsWriter) -> views.Deleted:
    """Withdraw an adapter. Base models belong to the installation."""
    if model in door.catalogue.names():
        raise Invalid(
            f"'{model}' is a base model of this installation; only adapters (ft:…) can be deleted.", param="model"
        )
    with door.session() as session:
        row = adapters.delete(session, model, project_id=caller.project_id)
        audit.record(session, caller, "model.delete", row.id, before={"name": row.name, "job_id": row.job_id})
    return views.Deleted(id=model, object="model")
