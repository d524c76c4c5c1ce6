"""Rules of projects: whose ID tokens are exchanged for a secret that lives for minutes (RFC 8693).

A rule owns a key without a lasting secret: its scopes, caps and figures are the key's, and every secret that a token is
exchanged for opens that one key. So two runs of one pipeline share idempotency, and an alias can be protected for them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Forbidden, Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.store.locks import one_at_a_time
from shared.store.tables import ApiKeyRow, KeySecretRow, OidcRuleRow, OrganizationRow, ProjectRow
from shared.tenants import audit, keys, projects, rotation
from shared.tenants.id_tokens import LEEWAY_SECONDS, BadToken, Claims
from shared.tenants.keys import Caller
from shared.tenants.plain_text import printable

MAX_RULES: Final = 50
# Claims that say who asks. A rule names one of them whose owner is spelled out: public issuers sign for everybody.
IDENTITIES: Final = (
    *("sub", "repository", "repository_id", "repository_owner", "repository_owner_id"),
    *("project_path", "project_id", "namespace_path", "namespace_id"),
)
# What the audit keeps of a token.
_NOTED: Final = (
    *("sub", "repository", "ref", "environment", "workflow_ref", "run_id", "run_attempt", "actor"),
    *("project_path", "pipeline_id", "job_id", "user_login"),
)
_NOTED_CHARACTERS: Final = 200


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a token was exchanged for."""

    rule: OidcRuleRow
    key: ApiKeyRow
    secret: str
    life_seconds: int


# --- rules ------------------------------------------------------------------------------------------------------------


def create(
    session: Session,
    caller: Caller,
    *,
    project_id: str,
    name: str,
    scopes: Sequence[str],
    issuer: str,
    issuers: Sequence[str],
    claims: dict[str, str],
    **values: Any,
) -> tuple[OidcRuleRow, ApiKeyRow]:
    """A rule and its key. Raises NotFound, Invalid, LimitReached.

    Args:
        issuers: those that the operator allows.
        values: `audience` and `life_seconds`.
    """
    projects.find(session, project_id)
    _refuse_scopes(scopes)
    if issuer not in issuers:
        raise Invalid(
            f"The issuer '{issuer[:200]}' is not allowed here. Allowed: {', '.join(issuers) or 'none'}."
            " An operator sets TUNEPOOL_OIDC_ISSUERS.",
            param="issuer",
        )
    _refuse_everybody(claims)
    one_at_a_time(session, f"oidc rules:{project_id}")
    if len(listed(session, project_id=project_id)) >= MAX_RULES:
        raise LimitReached(f"A project has {MAX_RULES} rules at the most; delete one first.", code="too_many_rules")
    key, _ = keys.create(session, project_id=project_id, name=name, scopes=scopes)  # nobody ever sees this secret
    key.prefix = keys.EXCHANGED
    row = OidcRuleRow(
        id=new_id("oidcrule_"), project_id=project_id, key_id=key.id, issuer=issuer, claims=claims, **values
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    audit.record(session, caller, "oidc_rule.create", row.id, after=_facts(row, key))
    return row, key


def _refuse_scopes(scopes: Sequence[str]) -> None:
    known = keys.SCOPES - {keys.ADMIN}
    unknown = sorted(set(scopes) - known)
    if unknown:
        raise Invalid(
            f"A rule gives no scope '{unknown[0][:100]}'. It may give: {', '.join(sorted(known))}.", param="scopes"
        )


def _refuse_everybody(claims: dict[str, str]) -> None:
    """Raises Invalid unless a claim says whose tokens are meant: up to its first slash it has no star."""
    for name in IDENTITIES:
        owner, _, _ = claims.get(name, "*").partition("/")
        if "*" not in owner:
            return
    raise Invalid(
        "'claims' must say whose tokens are meant: name the owner in full in one of " + ", ".join(IDENTITIES) + ".",
        param="claims",
    )


def _facts(row: OidcRuleRow, key: ApiKeyRow) -> dict[str, Any]:
    names = ("project_id", "key_id", "issuer", "audience", "claims", "life_seconds")
    return {name: getattr(row, name) for name in names} | {"name": key.name, "scopes": key.scopes}


def listed(session: Session, *, project_id: str | None = None) -> list[tuple[OidcRuleRow, ApiKeyRow]]:
    """The rules of a project, or all of them, each with its key; the oldest first."""
    query = select(OidcRuleRow, ApiKeyRow).join(ApiKeyRow, ApiKeyRow.id == OidcRuleRow.key_id).order_by(OidcRuleRow.id)
    if project_id is not None:
        query = query.where(OidcRuleRow.project_id == project_id)
    return [(rule, key) for rule, key in session.execute(query)]


def delete(session: Session, caller: Caller, rule_id: str) -> None:
    """End a rule, and every secret that was given by it. Raises NotFound."""
    row = session.get(OidcRuleRow, rule_id, with_for_update=True)
    if row is None:
        raise NotFound(f"No rule '{rule_id[:100]}'.", param="rule_id")
    keys.revoke(session, row.key_id)
    rotation.end_secrets(session, row.key_id)
    audit.record(session, caller, "oidc_rule.delete", row.id, before=_facts(row, keys.find(session, row.key_id)))
    session.delete(row)


# --- tokens -----------------------------------------------------------------------------------------------------------


def exchange(session: Session, claims: Claims, *, rule_id: str | None = None) -> Exchanged:
    """A secret for a token that has been verified (id_tokens.py).

    It ends with the rule's time, and with the token at the latest. Raises BadToken for a token that has been exchanged
    already, Forbidden when no rule accepts it, Invalid when several do and none is named.
    """
    rule, key = _chosen(session, claims, rule_id)
    now: datetime = session.scalars(select(func.now())).one()
    left = int(min(claims["exp"] + LEEWAY_SECONDS - now.timestamp(), 86400))
    life = max(1, min(rule.life_seconds, left))
    secret = keys.new_secret(keys.EXCHANGED)
    added = session.execute(
        insert(KeySecretRow)
        .values(
            sha256=keys.digest(secret),
            key_id=key.id,
            prefix=keys.shown(secret),
            origin=_origin(claims),
            expires_at=now + timedelta(seconds=life),
            kept_until=_end(claims),
        )
        .on_conflict_do_nothing()
        .returning(KeySecretRow.sha256)
    )
    if added.one_or_none() is None:
        raise BadToken("This ID token has been exchanged already; ask its issuer for a new one.")
    key.last_used_at = now
    noted: dict[str, Any] = {name: _noted(claims[name]) for name in _NOTED if name in claims}
    audit.record(session, _caller(session, key), "oidc.exchange", rule.id, after={**noted, "life_seconds": life})
    return Exchanged(rule, key, secret, life)


def _end(claims: Claims) -> datetime:
    """When a token is of no more use; of one that is for ever, the last moment that a row can hold."""
    end = min(claims["exp"] + LEEWAY_SECONDS + 1, 253_402_300_799)
    return datetime.fromtimestamp(end, tz=UTC)


def _chosen(session: Session, claims: Claims, rule_id: str | None) -> tuple[OidcRuleRow, ApiKeyRow]:
    query = (
        select(OidcRuleRow, ApiKeyRow)
        .join(ApiKeyRow, ApiKeyRow.id == OidcRuleRow.key_id)
        .where(OidcRuleRow.issuer == claims["iss"], ApiKeyRow.revoked_at.is_(None))
        .where(ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > func.now()))
        .order_by(OidcRuleRow.id)
    )
    accepting = [(rule, key) for rule, key in session.execute(query) if accepts(rule, claims)]
    chosen = [(rule, key) for rule, key in accepting if rule_id in {None, rule.id}]
    if not chosen:
        shown = (f"{name} {_noted(claims[name])}" for name in ("aud", "sub", "ref", "environment") if name in claims)
        named = "no rule accepts it" if rule_id is None else f"no rule '{rule_id[:100]}' accepts it"
        raise Forbidden(
            f"This ID token is genuine, and {named}. It says: {', '.join(shown)}. An administrator makes"
            " rules by POST /v1/tunepool/oidc/rules.",
            code="no_rule_accepts",
        )
    if len(chosen) > 1:
        names = ", ".join(rule.id for rule, _ in chosen[:10])
        raise Invalid(
            f"Several rules accept this ID token: {names}. Name one.", param="service_account_id", code="several_rules"
        )
    return chosen[0]


def accepts(rule: OidcRuleRow, claims: Claims) -> bool:
    """Whether a verified token is one that the rule is for."""
    audiences = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
    if claims["iss"] != rule.issuer or rule.audience not in audiences:
        return False
    return all(name in claims and matches(pattern, _text(claims[name])) for name, pattern in rule.claims.items())


def _text(value: Any) -> str | None:
    """A claim as a rule spells it; None for lists and objects, which no rule names."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int) else None


def matches(pattern: str, text: str | None) -> bool:
    """Whether a text is what a pattern says. `*` stands for any characters but `/` and `:`, `**` for any at all.

    No regular expression: the time is the product of both lengths, whoever wrote them.
    """
    if text is None:
        return False
    reached = {0}  # how much of the text the pattern so far may have taken
    for part in _parts(pattern):
        if part == "**":
            reached = set(range(min(reached), len(text) + 1))
        elif part == "*":
            reached = _run_on(reached, text)
        else:
            reached = {at + len(part) for at in reached if text.startswith(part, at)}
        if not reached:
            return False
    return len(text) in reached


def _parts(pattern: str) -> list[str]:
    return [part for part in re.split(r"(\*\*|\*)", pattern) if part]


def _run_on(reached: set[int], text: str) -> set[int]:
    """Every place that is reached from one of these without passing a `/` or a `:`."""
    places, at = set(), -1
    for start in sorted(reached):
        at = max(at, start)
        places.add(at)
        while at < len(text) and text[at] not in "/:":
            at += 1
            places.add(at)
    return places | reached


def _origin(claims: Claims) -> str | None:
    """What a token is known by when it comes again; None: it has no id."""
    if not claims.get("jti"):
        return None
    return hashlib.sha256(f"{claims['iss']}\n{claims['jti']}".encode()).hexdigest()


def _noted(value: Any) -> str:
    return printable(str(value), kept="")[:_NOTED_CHARACTERS]


def _caller(session: Session, key: ApiKeyRow) -> Caller:
    owner = session.execute(
        select(OrganizationRow.id, OrganizationRow.name)
        .join(ProjectRow, ProjectRow.organization_id == OrganizationRow.id)
        .where(ProjectRow.id == key.project_id)
    ).one()
    return Caller(key.id, key.project_id, owner.id, owner.name, frozenset(key.scopes))
