"""/ui/rules: whose ID tokens are exchanged for short-lived keys of which project."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.routes import oidc as oidc_routes
from api.routes import projects as project_routes
from api.ui import rendering, visits
from api.ui.visits import Operator, ProvenForm, SubmittedForm
from shared.errors import Invalid
from shared.tenants import keys

router = APIRouter(prefix="/ui/rules", route_class=visits.PageRoute, include_in_schema=False)


@router.get("")
def rules_page(request: Request, door: DoorDep, visit: Operator) -> Response:
    projects = project_routes.list_projects(visit.caller, door).data
    return rendering.page(
        request,
        visit,
        "rules.html",
        rules=oidc_routes.list_oidc_rules(visit.caller, door, project_id=None).data,
        issuers=door.id_tokens.issuers,
        projects=projects,
        names={project.id: project.name for project in projects},
        scopes=sorted(keys.SCOPES - {keys.ADMIN}),
    )


@router.post("")
def create_rule(door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    body: dict[str, Any] = {name: form.must(name) for name in ("name", "issuer", "audience", "project_id")}
    body["claims"] = _claims(form)
    body["scopes"] = form.all("scopes")
    if (minutes := form.number("life_minutes")) is not None:
        body["life_minutes"] = minutes
    oidc_routes.create_oidc_rule(visit.caller, json.dumps(body).encode(), door)
    return visits.back("/ui/rules")


@router.post("/{rule_id}/delete")
def delete_rule(rule_id: str, door: DoorDep, visit: Operator, form: ProvenForm) -> Response:
    oidc_routes.delete_oidc_rule(rule_id, visit.caller, door)
    return visits.back("/ui/rules")


def _claims(form: SubmittedForm) -> dict[str, str]:
    """One `claim = pattern` a line. Raises Invalid."""
    claims: dict[str, str] = {}
    for line in filter(None, map(str.strip, form.must("claims").splitlines())):
        claim, equals, pattern = (part.strip() for part in line.partition("="))
        if not (claim and equals and pattern) or claim in claims:
            raise Invalid(
                f"Write one claim a line, as in 'repository = acme/tickets', not '{line[:100]}'.", param="claims"
            )
        claims[claim] = pattern
    return claims
