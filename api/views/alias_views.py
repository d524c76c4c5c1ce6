"""Views of aliases, their versions, moves and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.store.tables import AliasRow, AliasVersionRow


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
    created_at: int


class Alias(View):
    id: str = Field(examples=["support-bot@prod"])
    object: Literal["tunepool.alias"] = "tunepool.alias"
    model: str
    version: int
    movers: list[str] | None = Field(description="Ids of the keys that may move it; null: every key with models:write.")
    created_at: int
    moved_at: int


class AliasWithHistory(Alias):
    history: list[AliasVersion] = Field(description="Newest first, at most 100.")


class AliasPage(View):
    object: Literal["list"] = "list"
    data: list[Alias]
    has_more: bool


class AliasMoved(View):
    """`moved` is false after a dry run, and where the alias named this model already."""

    object: Literal["tunepool.alias_move"] = "tunepool.alias_move"
    moved: bool
    alias: Alias | None = Field(description="null: after a dry run.")
    version: AliasVersion | None
    gate: dict[str, Any] | None


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
        created_at=seconds(row.created_at),
    )


def alias(row: AliasRow, *, model: str) -> Alias:
    """`model`: the name of what it names."""
    return Alias(
        id=row.name,
        model=model,
        version=row.version,
        movers=row.movers,
        created_at=seconds(row.created_at),
        moved_at=seconds(row.moved_at),
    )


def with_history(row: AliasRow, versions: Sequence[AliasVersionRow]) -> AliasWithHistory:
    shown = alias(row, model=versions[0].model)
    return AliasWithHistory(**shown.model_dump(), history=[version(past) for past in versions])


def moved(row: AliasRow, now: AliasVersionRow, *, moved: bool) -> AliasMoved:
    return AliasMoved(moved=moved, alias=alias(row, model=now.model), version=version(now), gate=now.gate)
