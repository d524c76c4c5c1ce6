"""/v1/models: base models of the catalogue, and the project's own adapters."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import Door, DoorDep, ModelsReader, ModelsWriter
from api.views import product_views, view
from shared.errors import Invalid
from shared.fleet import playgrounds
from shared.fleet.playgrounds import WarmModels
from shared.jobs import parents
from shared.products import adapters, aliases, sharing
from shared.settle.base_model_status import under_every_name
from shared.tenants import audit

router = APIRouter(prefix="/v1/models", tags=["models"])


def _base_models(door: Door, warm: WarmModels) -> list[product_views.Model]:
    return [
        product_views.base_model(name, standing, warm=standing.name in warm.base_models)
        for name, standing in under_every_name(door.catalogue)
    ]


@router.get("", response_model=product_views.ModelPage)
def list_models(door: DoorDep, caller: ModelsReader) -> product_views.ModelPage:
    """Everything `model` may name: base models with their states, the project's adapters, shared ones, aliases."""
    with door.session() as session:
        named, _ = aliases.page(session, project_id=caller.project_id, after=None, limit=10_000)
        own, _ = adapters.page(session, project_id=caller.project_id, after=None, limit=10_000)
        rows = [*own, *sharing.shared_with(session, caller.project_id)]
        warm = playgrounds.warm(session, pool_name=door.settings.pool)
    return product_views.ModelPage(
        data=[
            *_base_models(door, warm),
            *(
                product_views.model(
                    adapters.published(row), owner=caller.organization_name, warm=row.id in warm.adapters
                )
                for row in rows
            ),
            *(
                product_views.alias(row, owner=caller.organization_name, warm=row.model_id in warm.adapters)
                for row in named
            ),
        ]
    )


@router.get("/{model:path}", response_model=product_views.Model)
def retrieve_model(model: str, door: DoorDep, caller: ModelsReader) -> product_views.Model:
    """A base model, an adapter, a checkpoint, or an alias, which stands under its own name."""
    with door.session() as session:
        warm = playgrounds.warm(session, pool_name=door.settings.pool)
    catalogue = door.catalogue
    if not adapters.is_tuned(model) or catalogue.taken(model):
        name = model if catalogue.taken(model) else catalogue.name_of(model)
        known = next((entry for entry in _base_models(door, warm) if entry.id == name), None)
        if known is None:
            raise catalogue.unknown(model)
        return known
    with door.session() as session:
        published = adapters.find_published(session, model, project_id=caller.project_id)
    shown = product_views.model(published, owner=caller.organization_name, warm=published.id in warm.adapters)
    return shown.model_copy(update={"id": model}) if aliases.SIGN in model else shown


@router.delete("/{model:path}", response_model=view.Deleted)
def delete_model(model: str, door: DoorDep, caller: ModelsWriter) -> view.Deleted:
    """Withdraw an adapter. Base models belong to the installation."""
    if door.catalogue.taken(model):
        raise Invalid(
            f"'{model}' is a base model of this installation; only adapters (ft:…) can be deleted here. Base models "
            "are removed by DELETE /v1/tunepool/models/NAME, with the scope admin.",
            param="model",
        )
    with door.session() as session:
        row = parents.withdraw(session, model, project_id=caller.project_id)
        audit.record(session, caller, "model.delete", row.id, before={"name": row.name, "job_id": row.job_id})
    return view.Deleted(id=model, object="model")
