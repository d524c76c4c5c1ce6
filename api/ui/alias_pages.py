"""/ui/aliases: what a name stands for, every version it had with its gate, and how it is moved."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from api.deps import Door, DoorDep
from api.paging import AfterName
from api.routes import adapters as adapter_routes
from api.routes import aliases as alias_routes
from api.routes import promotions as promotion_routes
from api.ui import rendering, visits
from api.ui.visits import ModelsOrderer, ModelsVisitor, ProvenForm
from api.views import alias_views
from api.views.alias_views import AliasMoved
from shared.products import aliases, promotion_requests
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui/aliases", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
Number = Annotated[int | None, Query(ge=1, le=2**31 - 1)]


@router.get("")
def aliases_page(
    request: Request,
    door: DoorDep,
    visit: ModelsVisitor,
    after: AfterName = None,
) -> Response:
    listed = alias_routes.list_aliases(door, visit.caller, after=after, limit=ROWS)
    tuned = adapter_routes.list_adapters(request, door, visit.caller, after=None, limit=ROWS)
    values: dict[str, Any] = {"aliases": listed.data, "more": listed.has_more, "after": after, "tuned": tuned.data}
    return rendering.page(request, visit, "aliases.html", **values)


@router.post("")
def make_alias(request: Request, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    return _promote(request, door, visit, form, form.must("alias"), expected_version=0)


@router.get("/{name}")
def alias_page(
    name: str, request: Request, door: DoorDep, visit: ModelsVisitor, first: Number = None, second: Number = None
) -> Response:
    """One alias; with two numbers of versions, what differs between them."""
    compared = None
    if first is not None and second is not None:
        compared = alias_routes.compare_versions(name, first, second, door, visit.caller)
    return _alias(request, door, visit, name, compared=compared)


def _alias(request: Request, door: Door, visit: SignedIn, name: str, **more: Any) -> Response:
    tuned = adapter_routes.list_adapters(request, door, visit.caller, after=None, limit=ROWS)
    values = {"compared": None, "judged": None, "judging": False, "pending": None, **more}
    alias = alias_routes.retrieve_alias(name, door, visit.caller)
    values["waiting"] = _waiting(door, visit, name)
    return rendering.page(request, visit, "alias.html", alias=alias, tuned=tuned.data, **values)


def _waiting(door: Door, visit: SignedIn, name: str) -> list[alias_views.Promotion]:
    """The promotions of an alias that wait for approvals, oldest first."""
    with door.session() as session:
        alias = aliases.find(session, name, project_id=visit.caller.project_id)
        rows = promotion_requests.pending_of(session, alias.id)
        return [alias_views.promotion(row, alias, promotion_requests.approvals(session, row)) for row in rows]


@router.post("/{name}/promote")
def promote(name: str, request: Request, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    """Move it, or only judge the gate and show the verdict."""
    return _promote(request, door, visit, form, name, expected_version=form.number("expected_version"))


def _promote(
    request: Request,
    door: Door,
    visit: SignedIn,
    form: visits.SubmittedForm,
    name: str,
    *,
    expected_version: float | None,
) -> Response:
    body: dict[str, Any] = {"model": form.must("model"), "expected_version": expected_version}
    if form.get("gate"):
        body["gate"] = {"text": form.must("gate"), "evaluation": form.get("evaluation")}
    if form.get("reason"):
        body["reason"] = form.get("reason")
    body |= {"force": form.get("force") == "yes", "dry_run": form.get("act") == "judge"}
    moved: AliasMoved = alias_routes.promote_alias(name, visit.caller, json.dumps(body).encode(), door)
    if body["dry_run"]:
        request.state.filled = form.filled(request)
        return _alias(request, door, visit, name, judged=moved.gate, judging=True)
    if moved.promotion is not None:
        return _alias(request, door, visit, name, pending=moved.promotion)
    return visits.back(visits.address("/ui/aliases", name))


@router.post("/{name}/rollback")
def roll_back(name: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    body = {
        "to_version": form.number("to_version"),
        "expected_version": form.number("expected_version"),
        "reason": form.get("reason"),
    }
    alias_routes.roll_back_alias(name, visit.caller, json.dumps(body).encode(), door)
    return visits.back(visits.address("/ui/aliases", name))


@router.post("/{name}/promotions/{promotion_id}/approve")
def approve(name: str, promotion_id: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    promotion_routes.approve_promotion(promotion_id, door, visit.caller)
    return visits.back(visits.address("/ui/aliases", name))


@router.post("/{name}/promotions/{promotion_id}/withdraw")
def withdraw(name: str, promotion_id: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    body = json.dumps({"reason": form.get("reason")}).encode()
    promotion_routes.withdraw_promotion(promotion_id, visit.caller, body, door)
    return visits.back(visits.address("/ui/aliases", name))


@router.post("/{name}/delete")
def delete_alias(name: str, door: DoorDep, visit: ModelsOrderer, form: ProvenForm) -> Response:
    alias_routes.delete_alias(name, door, visit.caller)
    return visits.back("/ui/aliases")
