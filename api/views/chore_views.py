"""Views of unfinished work of the CPU lane."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View
from shared.chores.cancelling import OpenChore


class Chore(View):
    id: str = Field(examples=["merge_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.chore"] = "tunepool.chore"
    kind: str = Field(examples=["merge"])
    project_id: str | None = Field(description="null: the installation's own, such as a look-up of a base model.")
    worker_id: str | None = Field(description="Who holds it; null while it waits.")
    failures: int = Field(description="Workers that it has ended, and tries that failed.")


class ChorePage(View):
    object: Literal["list"] = "list"
    data: list[Chore]
    has_more: bool


def chore(seen: OpenChore) -> Chore:
    return Chore(
        id=seen.id,
        kind=seen.kind,
        project_id=seen.project_id or None,
        worker_id=seen.worker_id,
        failures=seen.failures,
    )
