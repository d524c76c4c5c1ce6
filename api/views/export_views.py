"""Views of exports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.product_views import AdapterFile
from api.views.view import View, seconds
from shared.contract.documents import JobError
from shared.contract.merge_request import CreateExport, CreatePush
from shared.store.tables import ExportRow


class Export(View):
    """A tuned model as files for llama.cpp and Ollama, or files on their way to a hub."""

    id: str = Field(examples=["export_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.export"] = "tunepool.export"
    status: Literal["queued", "running", "succeeded", "failed"]
    request: CreateExport | CreatePush = Field(description="As settled: the model's own name, and the quantization.")
    base_model: str
    created_at: int
    finished_at: int | None
    error: JobError | None
    blocked_by: str | None = Field(examples=["host_memory_taken"], description="Why it waits to be tried again.")
    detail: str | None
    files: list[AdapterFile] = Field(description="Empty until it has succeeded, and of a push.")
    url: str | None = Field(description="Of a push that has succeeded: the repository.")


class ExportPage(View):
    object: Literal["list"] = "list"
    data: list[Export]
    has_more: bool


def export(row: ExportRow, *, files: list[AdapterFile]) -> Export:
    # What is said of a queued one did not end it.
    error = None if row.error is None else JobError.model_validate(row.error)
    waits_for = error if row.status == "queued" else None
    return Export(
        id=row.id,
        status=row.status,
        request=(CreatePush if row.kind == "hub" else CreateExport).model_validate(row.request, extra="ignore"),
        base_model=row.base_model,
        created_at=seconds(row.created_at),
        finished_at=None if row.finished_at is None else seconds(row.finished_at),
        error=error if row.status == "failed" else None,
        blocked_by=None if waits_for is None else waits_for.code,
        detail=None if waits_for is None else waits_for.message,
        files=files,
        url=(row.manifest or {}).get("url"),
    )
