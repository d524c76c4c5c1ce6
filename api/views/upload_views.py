"""Views of uploads in parts, in OpenAI's form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.file_views import File
from api.views.file_views import file as file_view
from api.views.view import View, seconds
from shared.store.tables import FileRow, UploadPartRow, UploadRow


class PartedUpload(View):
    id: str = Field(examples=["upload_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["upload"] = "upload"
    bytes: int = Field(description="Of the whole file, as it was announced.")
    created_at: int
    expires_at: int = Field(description="An upload that is still pending then has expired.")
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = Field(default=None, description="Of a completed upload.")


class PartOfUpload(View):
    id: str = Field(examples=["part_0193a1b2c3d4e5f60718293a4b5c6d7f"])
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def upload(row: UploadRow, *, file: FileRow | None = None) -> PartedUpload:
    return PartedUpload.model_validate(
        {
            "id": row.id,
            "bytes": row.bytes,
            "created_at": seconds(row.created_at),
            "expires_at": seconds(row.expires_at),
            "filename": row.filename,
            "purpose": row.purpose,
            "status": row.status,
            "file": None if file is None else file_view(file),
        }
    )


def part(row: UploadPartRow) -> PartOfUpload:
    return PartOfUpload(id=row.id, created_at=seconds(row.created_at), upload_id=row.upload_id)
