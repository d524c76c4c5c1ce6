"""Views of files in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.store.tables import FileRow


def _is_null(value: object) -> bool:
    return value is None


class FileWarning(View):
    code: str = Field(examples=["dropped_columns"])
    message: str
    line: int = Field(description="The first that shows it.")
    rows: int


class FileFindings(View):
    """What the check of a training file found."""

    format: str | None = Field(default=None, examples=["chat"], description="Null until a training file is checked.")
    shape: str | None = Field(default=None, description="As uploaded: chat, sharegpt, alpaca …")
    rows: int = 0
    dropped_columns: list[str] = Field(default=[], description="Columns that the format does not use.")
    warnings: list[FileWarning] = Field(default=[])


class FileExtension(FileFindings):
    """Ours: what OpenAI's wire has no word for."""

    sha256: str = Field(description="Of the bytes as they were uploaded, in hexadecimal.")


class File(View):
    id: str = Field(examples=["file-0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    # Node's types have these two optional and never null.
    status_details: Annotated[str | None, Field(exclude_if=_is_null)] = None
    expires_at: Annotated[int | None, Field(exclude_if=_is_null)] = None
    tunepool: FileExtension


class FilePage(View):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file(row: FileRow) -> File:
    return File.model_validate(
        {
            "id": row.id,
            "bytes": row.bytes,
            "created_at": seconds(row.created_at),
            "filename": row.filename,
            "purpose": row.purpose,
            "status": row.status,
            "status_details": row.status_details,
            "expires_at": maybe_seconds(row.expires_at),
            "tunepool": {**(row.report or {}), "sha256": row.sha256},
        }
    )
