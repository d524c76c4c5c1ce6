"""/v1/tunepool/adapters: the product, file by file."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.deps import Door, DoorDep, ModelsReader
from api.downloads import linked
from api.paging import After, Limit
from api.views import product_views, view
from shared.contract.preflight_report import ServerVerdict
from shared.contract.published import published_shape
from shared.products import adapters, servability
from shared.products.adapters import PublishedAdapter

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])


@router.get("/adapters", response_model=product_views.AdapterPage)
def list_adapters(
    request: Request,
    door: DoorDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> product_views.AdapterPage:
    """The project's adapters, newest first."""
    with door.session() as session:
        rows, more = adapters.page(session, project_id=caller.project_id, after=after, limit=limit)
    return product_views.AdapterPage(
        data=[_view(adapters.published(row), door, request) for row in rows], has_more=more
    )


@router.get("/adapters/{name:path}", response_model=product_views.AdapterView)
def retrieve_adapter(name: str, request: Request, door: DoorDep, caller: ModelsReader) -> product_views.AdapterView:
    """The adapter of a job or a checkpoint, by id or `ft:` name, with a link for each file of its PEFT directory."""
    with door.session() as session:
        source = adapters.find_source(session, name, project_id=caller.project_id)
    return _view(source.adapter, door, request, servable=servability.verdicts(published_shape(source.spec)))


def _view(
    adapter: PublishedAdapter, door: Door, request: Request, *, servable: list[ServerVerdict] | None = None
) -> product_views.AdapterView:
    return product_views.AdapterView(
        id=adapter.id,
        name=adapter.name,
        job_id=adapter.job_id,
        base_model=adapter.base_model,
        created_at=view.seconds(adapter.created_at),
        location=_location(adapter, door),
        files=linked(adapter.files, door, request),
        servable=servable,
    )


def _location(adapter: PublishedAdapter, door: Door) -> str:
    first = next(iter(adapter.files), None)
    if first is None:  # of a version that published an empty folder
        return ""
    return f"{door.settings.storage.rstrip('/')}/{first.key.removesuffix(first.name).rstrip('/')}"
