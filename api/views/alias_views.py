"""Views of aliases, their versions, moves and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.store.tables import AliasRow, AliasVersionRow, PromotionRow


class AliasVersion(View):
    """One move of an alias."""

    number: int
    kind: Literal["promote", "rollback"]
    model: str
    base_model: str
    job_id: str | None = Field(description="null: a combination.")
    restores: int | None = Field(description="Of a rollback: the version that holds again.")
    gate: dict[str, Any] | None = Field(
        description="Its result: status, assertions with figures and reasons, evidence."
    )
    forced: bool
    reason: str | None
    key_id: str
    approved_by: list[str] | None = Field(description="Ids of keys; null: no approval was needed.")
    created_at: int


class Alias(View):
    id: str = Field(examples=["support-bot@prod"])
    object: Literal["tunepool.alias"] = "tunepool.alias"
    model: str
    version: int
    movers: list[str] | None = Field(description="Ids of the keys that may move it; null: every key with models:write.")
    approvals: int = Field(description="How many other keys must approve a promotion.")
    approvers: list[str] | None = Field(description="Ids of the keys that may approve; null: every key.")
    created_at: int
    moved_at: int


class AliasWithHistory(Alias):
    history: list[AliasVersion] = Field(description="Newest first, at most 100.")


class AliasPage(View):
    object: Literal["list"] = "list"
    data: list[Alias]
    has_more: bool


class Promotion(View):
    """A promotion that needs approvals."""

    id: str = Field(examples=["promo_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.promotion"] = "tunepool.promotion"
    alias: str
    model: str
    state: Literal["pending", "moved", "withdrawn", "expired", "overtaken", "refused"]
    approvals: int = Field(description="How many it needs.")
    approved_by: list[str] = Field(description="Ids of the keys that have approved.")
    key_id: str = Field(description="Who asked, and cannot approve.")
    from_version: int = Field(description="What the alias must still be at.")
    gate: dict[str, Any] | None = Field(description="Its result when it was asked for; it is judged again.")
    forced: bool
    reason: str | None
    outcome: str | None = Field(description="Why it ended without a move.")
    code: str | None
    version: int | None = Field(description="That it became.")
    created_at: int
    expires_at: int
    ended_at: int | None


class PromotionPage(View):
    object: Literal["list"] = "list"
    data: list[Promotion]
    has_more: bool


class AliasMoved(View):
    """`moved` is false after a dry run, where the alias named this model already, and while approvals are missing."""

    object: Literal["tunepool.alias_move"] = "tunepool.alias_move"
    moved: bool
    alias: Alias | None = Field(description="null: after a dry run.")
    version: AliasVersion | None
    gate: dict[str, Any] | None
    promotion: Promotion | None = Field(default=None, description="What waits for approvals.")


class FieldDifference(View):
    field: str = Field(examples=["spec.adapter.r"])
    first: Any
    second: Any


class AliasComparison(View):
    object: Literal["tunepool.alias_comparison"] = "tunepool.alias_comparison"
    first: AliasVersion
    second: AliasVersion
    differences: list[FieldDifference]


def version(row: AliasVersionRow) -> AliasVersion:
    return AliasVersion(
        number=row.number,
        kind=row.kind,
        model=row.model,
        base_model=row.base_model,
        job_id=row.job_id,
        restores=row.restores,
        gate=row.gate,
        forced=row.forced,
        reason=row.reason,
        key_id=row.key_id,
        approved_by=row.approved_by,
        created_at=seconds(row.created_at),
    )


def alias(row: AliasRow, *, model: str) -> Alias:
    """`model`: the name of what it names."""
    return Alias(
        id=row.name,
        model=model,
        version=row.version,
        movers=row.movers,
        approvals=row.approvals,
        approvers=row.approvers,
        created_at=seconds(row.created_at),
        moved_at=seconds(row.moved_at),
    )


def with_history(row: AliasRow, versions: Sequence[AliasVersionRow]) -> AliasWithHistory:
    shown = alias(row, model=versions[0].model)
    return AliasWithHistory(**shown.model_dump(), history=[version(past) for past in versions])


def moved(
    row: AliasRow,
    now: AliasVersionRow,
    *,
    moved: bool,
    pending: PromotionRow | None = None,
    approved: Sequence[str] = (),
) -> AliasMoved:
    waiting = None if pending is None else promotion(pending, row, approved)
    gate = now.gate if pending is None else pending.gate
    return AliasMoved(
        moved=moved, alias=alias(row, model=now.model), version=version(now), gate=gate, promotion=waiting
    )


def promotion(row: PromotionRow, of: AliasRow, approved_by: Sequence[str]) -> Promotion:
    return Promotion.model_validate(
        {
            "id": row.id,
            "alias": of.name,
            "model": row.model,
            "state": row.state,
            "approvals": of.approvals,
            "approved_by": list(approved_by),
            "key_id": row.key_id,
            "from_version": row.from_version,
            "gate": row.gate,
            "forced": row.wish["force"] and (row.gate is None or row.gate["status"] != "passed"),
            "reason": row.reason,
            "outcome": row.outcome,
            "code": row.code,
            "version": row.version,
            "created_at": seconds(row.created_at),
            "expires_at": seconds(row.expires_at),
            "ended_at": maybe_seconds(row.ended_at),
        }
    )
