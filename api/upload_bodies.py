"""Bodies of OpenAI's routes of uploads in parts and of permissions. Strict, like every body."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from api.file_rules import MAX_LIFE_SECONDS, MIN_LIFE_SECONDS
from shared.contract.part import Part
from shared.products.parted_uploads import MAX_PARTS


class FileLife(Part):
    """When the file goes by itself."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFE_SECONDS, le=MAX_LIFE_SECONDS)


class CreateUpload(Part):
    """What is going to come."""

    bytes: int = Field(ge=1, description="Of the whole file.")
    filename: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    expires_after: FileLife | None = Field(default=None, description="Of the file; null: it is kept.")


class CompleteUpload(Part):
    """The order of the parts."""

    part_ids: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field(
        min_length=1, max_length=MAX_PARTS, description="In the order of the file."
    )
    md5: Annotated[str, StringConstraints(pattern="^[0-9A-Fa-f]{32}$")] | None = Field(
        default=None, description="Of the whole file, in hexadecimal; checked when it is given."
    )


class CreatePermissions(Part):
    """Who may use it from now on."""

    project_ids: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field(
        min_length=1, max_length=100
    )


BODIES: Final = (CreateUpload, CompleteUpload, CreatePermissions)
