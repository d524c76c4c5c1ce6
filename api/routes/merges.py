"""/v1/tunepool/merges and /combinations: products made of adapters without training."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.body import RawBody, body_of, parse
from api.deps import Door, DoorDep, ModelsReader, ModelsWriter
from api.downloads import linked
from api.paging import After, Limit
from api.views import product_views, view
from shared.chores import merges, reach
from shared.contract.merge_request import CreateCombination, CreateMerge
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

MERGE_BODY = body_of(CreateMerge, example={"adapter": "ft:smollm2-135m-instruct:acme:tickets:0193a1b2", "onto": "base"})
COMBINATION_BODY = body_of(
    CreateCombination,
    example={
        "adapters": [
            {"adapter": "ft:smollm2-135m-instruct:acme:tickets:0193a1b2", "weight": 0.7},
            {"adapter": "ft:smollm2-135m-instruct:acme:tone:0193a1b3", "weight": 0.3},
        ],
        "combination_type": "cat",
    },
)


@router.post("/merges", response_model=product_views.Merge, openapi_extra=MERGE_BODY)
def create_merge(caller: ModelsWriter, body: RawBody, door: DoorDep, request: Request) -> product_views.Merge:
    """Have an adapter merged into its base model: a plain model directory."""
    return _create(parse(body, CreateMerge), caller, door, request)


@router.post("/combinations", response_model=product_views.Merge, openapi_extra=COMBINATION_BODY)
def create_combination(caller: ModelsWriter, body: RawBody, door: DoorDep, request: Request) -> product_views.Merge:
    """Have several adapters of one base model combined, each with a weight: a plain PEFT directory."""
    return _create(parse(body, CreateCombination), caller, door, request)


def _create(wanted: merges.Request, caller: Caller, door: Door, request: Request) -> product_views.Merge:
    with door.session() as session:
        row = merges.submit(session, wanted, project_id=caller.project_id)
        audit.record(session, caller, f"{row.kind}.create", row.id)
    door.ring("cpu")
    return product_views.merge(row, files=linked(merges.product(row), door, request))


@router.get("/merges", response_model=product_views.MergePage)
def list_merges(
    request: Request,
    door: DoorDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> product_views.MergePage:
    """The project's merges and combinations, newest first."""
    with door.session() as session:
        rows, more = merges.page(session, project_id=caller.project_id, after=after, limit=limit)
    data = [product_views.merge(row, files=linked(merges.product(row), door, request)) for row in rows]
    return product_views.MergePage(data=data, has_more=more)


def of_model(door: Door, caller: Caller, request: Request, name: str, *, limit: int) -> list[product_views.Merge]:
    """Merges of a tuned model and of its checkpoints, newest first."""
    with door.session() as session:
        rows = merges.of_model(session, name, project_id=caller.project_id, limit=limit)
    return [product_views.merge(row, files=linked(merges.product(row), door, request)) for row in rows]


@router.get("/merges/{merge_id}", response_model=product_views.Merge)
def retrieve_merge(merge_id: str, request: Request, door: DoorDep, caller: ModelsReader) -> product_views.Merge:
    """A merge or combination; once it has succeeded, with a link for each file."""
    with door.session() as session:
        row = merges.find(session, merge_id, project_id=caller.project_id)
    return product_views.merge(row, files=linked(merges.product(row), door, request))


@router.delete("/merges/{merge_id}", response_model=view.Deleted)
def delete_merge(merge_id: str, door: DoorDep, caller: ModelsWriter) -> view.Deleted:
    """Withdraw a product and its files. One that is not made yet ends, also by a key with the scope admin."""
    with door.session() as session:
        owner = reach.project_of(session, merges.MERGE, merge_id, caller=caller)
        row = merges.delete(session, merge_id, project_id=owner)
        before = {"status": row.status, "project_id": row.project_id}
        audit.record(session, caller, f"{row.kind}.delete", merge_id, before=before)
    return view.Deleted(id=merge_id, object="tunepool.merge")
