"""Bodies of the routes for ID tokens. Strict, like every body."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from api.pool_bodies import Name
from shared.contract.part import Part
from shared.tenants.id_tokens import MOST_CHARACTERS

ClaimName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,100}$")]
# Four stars at the most.
ClaimPattern = Annotated[str, StringConstraints(max_length=255, pattern=r"^([^*]*\*\*?){0,4}[^*]*$", min_length=1)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class CreateOidcRule(Part):
    """Whose ID tokens are exchanged for what."""

    name: Name
    issuer: Url = Field(description="As tokens spell it, such as https://token.actions.githubusercontent.com.")
    audience: Url = Field(description="Whom the tokens must be meant for: the address of this service is a good one.")
    claims: dict[ClaimName, ClaimPattern] = Field(
        min_length=1,
        max_length=10,
        description="Claim -> what it must be; `*` stands for any characters but `/` and `:`, `**` for any at all.",
    )
    scopes: list[Annotated[str, StringConstraints(max_length=40)]] = Field(min_length=1, max_length=20)
    life_minutes: int = Field(
        default=60, ge=1, le=720, description="A secret ends after this, and with its ID token at the latest."
    )
    project_id: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        default=None, description="null: the caller's own."
    )


class ExchangeToken(Part):
    """RFC 8693 in JSON, as the openai client's `workload_identity` sends it."""

    grant_type: Literal["urn:ietf:params:oauth:grant-type:token-exchange"]
    subject_token: Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)] = Field(
        description="The ID token."
    )
    subject_token_type: Literal["urn:ietf:params:oauth:token-type:id_token", "urn:ietf:params:oauth:token-type:jwt"]
    identity_provider_id: Url | None = Field(default=None, description="The token's issuer, when it is given.")
    service_account_id: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        default=None, description="The rule's id; null: the one that accepts the token."
    )


BODIES: Final = (CreateOidcRule, ExchangeToken)
