"""Views of a project's secrets: names and moments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.store.tables import ProjectSecretRow


class ProjectSecret(View):
    id: str = Field(description="Its name.", examples=["WANDB_API_KEY"])
    object: Literal["tunepool.secret"] = "tunepool.secret"
    created_at: int
    updated_at: int


class SecretPage(View):
    object: Literal["list"] = "list"
    data: list[ProjectSecret]


def secret(row: ProjectSecretRow) -> ProjectSecret:
    return ProjectSecret(id=row.name, created_at=seconds(row.created_at), updated_at=seconds(row.updated_at))
