"""Views of rules for ID tokens, and of what a token is exchanged for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.store.tables import ApiKeyRow, OidcRuleRow
from shared.tenants.oidc_rules import Exchanged


class OidcRule(View):
    id: str = Field(examples=["oidcrule_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.oidc_rule"] = "tunepool.oidc_rule"
    project_id: str
    key_id: str = Field(description="Its key: caps, usage and protected aliases go by this id.")
    name: str
    issuer: str
    audience: str
    claims: dict[str, str]
    scopes: list[str]
    life_minutes: int
    created_at: int
    last_used_at: int | None


class OidcRulePage(View):
    object: Literal["list"] = "list"
    data: list[OidcRule]


class ExchangedToken(View):
    """RFC 8693, section 2.2.1."""

    access_token: str = Field(description="An API key, `tpo_…`. Nothing can show it again.")
    issued_token_type: Literal["urn:ietf:params:oauth:token-type:access_token"]
    token_type: Literal["Bearer"]
    expires_in: int = Field(description="Seconds.")
    scope: str = Field(description="By spaces.", examples=["files:write jobs:write"])
    project_id: str
    rule_id: str


def oidc_rule(rule: OidcRuleRow, key: ApiKeyRow) -> OidcRule:
    return OidcRule(
        id=rule.id,
        project_id=rule.project_id,
        key_id=rule.key_id,
        name=key.name,
        issuer=rule.issuer,
        audience=rule.audience,
        claims=rule.claims,
        scopes=key.scopes,
        life_minutes=rule.life_seconds // 60,
        created_at=seconds(rule.created_at),
        last_used_at=maybe_seconds(key.last_used_at),
    )


def exchanged(given: Exchanged) -> ExchangedToken:
    return ExchangedToken(
        access_token=given.secret,
        issued_token_type="urn:ietf:params:oauth:token-type:access_token",  # noqa: S106 -- names a kind
        token_type="Bearer",  # noqa: S106 -- the same
        expires_in=given.life_seconds,
        scope=" ".join(given.key.scopes),
        project_id=given.key.project_id,
        rule_id=given.rule.id,
    )
