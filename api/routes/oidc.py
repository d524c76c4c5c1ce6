"""/v1/tunepool/oidc: ID tokens of CI systems for keys that live for minutes, by rules of the projects."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.body import RawBody, body_of, parse
from api.deps import Administrator, DoorDep
from api.oidc_bodies import CreateOidcRule, ExchangeToken
from api.views import oidc_views, view
from shared.errors import Invalid, Unauthenticated
from shared.tenants import oidc_rules

router = APIRouter(prefix="/v1/tunepool/oidc", tags=["oidc"])


@router.post("/token", response_model=oidc_views.ExchangedToken, openapi_extra=body_of(ExchangeToken))
def exchange_token(request: Request, response: Response, body: RawBody, door: DoorDep) -> oidc_views.ExchangedToken:
    """Exchange an ID token of an allowed issuer for a key of the rule that accepts it. Needs no key.

    The key ends with the rule's time, and with the token at the latest. A token is exchanged once.
    """
    wanted = parse(body, ExchangeToken)
    try:
        claims = door.id_tokens.verify(wanted.subject_token)
        if wanted.identity_provider_id not in {None, claims["iss"]}:
            raise Invalid(
                f"'identity_provider_id' must be the token's issuer, {claims['iss']}, or left out.",
                param="identity_provider_id",
            )
        with door.session() as session:
            given = oidc_rules.exchange(session, claims, rule_id=wanted.service_account_id or None)
    except Unauthenticated:
        door.admission.refused(request)
        raise
    response.headers["Cache-Control"] = "no-store"  # RFC 6749, section 5.1
    return oidc_views.exchanged(given)


@router.post("/rules", response_model=oidc_views.OidcRule, openapi_extra=body_of(CreateOidcRule))
def create_oidc_rule(caller: Administrator, body: RawBody, door: DoorDep) -> oidc_views.OidcRule:
    """Have the ID tokens that fit exchanged for keys of a project. A rule never gives the scope admin."""
    wanted = parse(body, CreateOidcRule)
    values = wanted.model_dump(exclude={"life_minutes", "project_id"})
    with door.session() as session:
        rule, key = oidc_rules.create(
            session,
            caller,
            project_id=wanted.project_id or caller.project_id,
            issuers=door.id_tokens.issuers,
            life_seconds=60 * wanted.life_minutes,
            **values,
        )
        return oidc_views.oidc_rule(rule, key)


@router.get("/rules", response_model=oidc_views.OidcRulePage)
def list_oidc_rules(
    caller: Administrator, door: DoorDep, project_id: Annotated[str | None, Query(max_length=100)] = None
) -> oidc_views.OidcRulePage:
    """The rules of all projects or of one, the oldest first."""
    with door.session() as session:
        rows = oidc_rules.listed(session, project_id=project_id)
        return oidc_views.OidcRulePage(data=[oidc_views.oidc_rule(rule, key) for rule, key in rows])


@router.delete("/rules/{rule_id}", response_model=view.Deleted)
def delete_oidc_rule(rule_id: str, caller: Administrator, door: DoorDep) -> view.Deleted:
    """End a rule, and every key that was given by it, at once."""
    with door.session() as session:
        oidc_rules.delete(session, caller, rule_id)
    return view.Deleted(id=rule_id, object="tunepool.oidc_rule")
