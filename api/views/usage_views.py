"""Views of what was done and used: the audit and the device-seconds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.store.tables import AuditRow
from shared.tenants.usage import UsageSum


class AuditEntry(View):
    object: Literal["tunepool.audit_entry"] = "tunepool.audit_entry"
    id: str
    created_at: int
    key_id: str
    action: str = Field(examples=["worker.drain"])
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditPage(View):
    object: Literal["list"] = "list"
    data: list[AuditEntry]
    has_more: bool


class UsageGroup(View):
    project: str | None = None
    key: str | None = None
    model: str | None = None
    labels: dict[str, str | None] = Field(default_factory=dict)
    device_seconds: float
    attempts: int
    jobs: int


class Usage(View):
    object: Literal["tunepool.usage"] = "tunepool.usage"
    since: int = Field(serialization_alias="from")
    until: int = Field(serialization_alias="to")
    group_by: list[str]
    device_seconds: float
    data: list[UsageGroup]


def audit_entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        created_at=seconds(row.created_at),
        key_id=row.key_id,
        action=row.action,
        target=row.target,
        before=row.before,
        after=row.after,
    )


def usage_group(used: UsageSum) -> UsageGroup:
    return UsageGroup(
        project=used.project,
        key=used.key,
        model=used.model,
        labels=used.labels,
        device_seconds=used.device_seconds,
        attempts=used.attempts,
        jobs=used.jobs,
    )
