"""Views of permissions, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from api.views.view import View, seconds
from shared.store.tables import PermissionRow


class CheckpointPermission(View):
    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str


class PermissionPage(View):
    object: Literal["list"] = "list"
    data: list[CheckpointPermission]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(rows: Sequence[PermissionRow], *, more: bool) -> PermissionPage:
    data = [
        CheckpointPermission(id=row.id, created_at=seconds(row.created_at), project_id=row.project_id) for row in rows
    ]
    return PermissionPage(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )
