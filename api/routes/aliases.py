"""/v1/tunepool/aliases: movable names of tuned models, their history, promotion and rollback."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.alias_bodies import EditAlias, GateBody, PromoteAlias, RollBackAlias
from api.body import RawBody, body_of, parse
from api.deps import Administrator, DoorDep, ModelsReader, ModelsWriter
from api.paging import AfterName, Limit
from api.views import alias_views, view
from shared.errors import Conflict, Invalid
from shared.operating import promotion
from shared.operating.promotion import PromotionRequest
from shared.products import aliases, promotion_requests
from shared.products.gate_checks import GateWish
from shared.products.version_differences import differences

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

Number = Annotated[int, Query(ge=1, le=2**31 - 1)]


@router.get("/aliases", response_model=alias_views.AliasPage)
def list_aliases(
    door: DoorDep,
    caller: ModelsReader,
    after: AfterName = None,
    limit: Limit = 20,
) -> alias_views.AliasPage:
    """The project's aliases by name, with what each of them names now. `after`: the last name of the page before."""
    with door.session() as session:
        rows, more = aliases.page(session, project_id=caller.project_id, after=after, limit=limit)
        data = [alias_views.alias(row, model=aliases.version(session, row, row.version).model) for row in rows]
    return alias_views.AliasPage(data=data, has_more=more)


@router.get("/aliases/{name}", response_model=alias_views.AliasWithHistory)
def retrieve_alias(name: str, door: DoorDep, caller: ModelsReader) -> alias_views.AliasWithHistory:
    """What an alias names, and every version that it has had: job, gate, who, when and why."""
    with door.session() as session:
        row = aliases.find(session, name, project_id=caller.project_id)
        return alias_views.with_history(row, aliases.history(session, row))


@router.get("/aliases/{name}/compare", response_model=alias_views.AliasComparison)
def compare_versions(
    name: str, first: Number, second: Number, door: DoorDep, caller: ModelsReader
) -> alias_views.AliasComparison:
    """Two versions side by side, and every field in which they differ: data, settled spec, figures of the gates."""
    with door.session() as session:
        row = aliases.find(session, name, project_id=caller.project_id)
        sides = [aliases.version(session, row, number) for number in (first, second)]
        fields = differences(session, *sides)
    return alias_views.AliasComparison(
        first=alias_views.version(sides[0]),
        second=alias_views.version(sides[1]),
        differences=[alias_views.FieldDifference(**field) for field in fields],
    )


@router.post("/aliases/{name}/promote", response_model=alias_views.AliasMoved, openapi_extra=body_of(PromoteAlias))
def promote_alias(name: str, caller: ModelsWriter, body: RawBody, door: DoorDep) -> alias_views.AliasMoved:
    """Have an alias name a model whose gate has passed; it is made where there is none. Of two at once one wins.

    Where the alias needs approvals nothing moves yet: `promotion` is what waits for them.
    The other gets a 409 `alias_moved` that says who came first. A gate that has not passed is a 409 `gate_failed` or
    `gate_undecided`, unless `force` is given with a reason.
    """
    asked = parse(body, PromoteAlias, data=["gate"])
    _refuse_base_name(name, taken=door.catalogue.taken(name))
    wish = PromotionRequest(name, asked.model, _gate(asked.gate), asked.expected_version, asked.force, asked.reason)
    with door.session() as session:
        if asked.dry_run:
            gate = promotion.weighed(session, wish, caller)
            return alias_views.AliasMoved(moved=False, alias=None, version=None, gate=gate)
        move = promotion.promote(session, wish, caller)
        approved = [] if move.pending is None else promotion_requests.approvals(session, move.pending)
    return alias_views.moved(move.alias, move.version, moved=move.moved, pending=move.pending, approved=approved)


@router.post("/aliases/{name}/rollback", response_model=alias_views.AliasMoved, openapi_extra=body_of(RollBackAlias))
def roll_back_alias(name: str, caller: ModelsWriter, body: RawBody, door: DoorDep) -> alias_views.AliasMoved:
    """Have an alias name again what it named before, or at `to_version`. Again goes back one more."""
    asked = parse(body, RollBackAlias)
    with door.session() as session:
        move = promotion.rollback(
            session,
            name,
            caller,
            to=asked.to_version,
            reason=asked.reason,
            expected_version=asked.expected_version,
        )
    return alias_views.moved(move.alias, move.version, moved=move.moved)


@router.patch("/aliases/{name}", response_model=alias_views.Alias, openapi_extra=body_of(EditAlias))
def edit_alias(name: str, caller: Administrator, body: RawBody, door: DoorDep) -> alias_views.Alias:
    """Protect an alias: which keys may move it, how many others must approve. What is named changes."""
    asked = parse(body, EditAlias)
    changes = asked.model_dump(exclude_unset=True, exclude={"project_id"})
    if not changes:
        raise Invalid("Name what changes: 'movers', 'approvals' or 'approvers'.", param="movers")
    with door.session() as session:
        project_id = asked.project_id or caller.project_id
        row, version = promotion.protect(session, name, caller, project_id=project_id, changes=changes)
    return alias_views.alias(row, model=version.model)


@router.delete("/aliases/{name}", response_model=view.Deleted)
def delete_alias(name: str, door: DoorDep, caller: ModelsWriter) -> view.Deleted:
    """Take an alias away. The models that it has named stay."""
    with door.session() as session:
        promotion.remove(session, name, caller)
    return view.Deleted(id=name, object="tunepool.alias")


def _gate(body: GateBody | None) -> GateWish | None:
    if body is None:
        return None
    if (body.evaluation is None) == (body.report is None):
        raise Invalid("A gate needs either 'evaluation' or 'report'.", param="gate.evaluation")
    return GateWish(body.text, body.evaluation, body.report, dict(body.roles))


def _refuse_base_name(name: str, *, taken: bool) -> None:
    if taken:
        raise Conflict(f"'{name[:200]}' is a base model of this installation; choose another name.", param="alias")
