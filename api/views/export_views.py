"""Views of exports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.product_views import AdapterFile, ProductView, product_fields
from api.views.view import View
from shared.contract.merge_request import CreateExport, CreatePush
from shared.store.tables import ExportRow


class Export(ProductView):
    """A tuned model as files for llama.cpp and Ollama, or files on their way to a hub."""

    id: str = Field(examples=["export_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.export"] = "tunepool.export"
    request: CreateExport | CreatePush = Field(description="As settled: the model's own name, and the quantization.")
    files: list[AdapterFile] = Field(description="Empty until it has succeeded, and of a push.")
    url: str | None = Field(description="Of a push that has succeeded: the repository.")


class ExportPage(View):
    object: Literal["list"] = "list"
    data: list[Export]
    has_more: bool


def export(row: ExportRow, *, files: list[AdapterFile]) -> Export:
    body = CreatePush if row.kind == "hub" else CreateExport
    return Export(
        request=body.model_validate(row.request, extra="ignore"),
        url=(row.manifest or {}).get("url"),
        **product_fields(row, files=files),
    )
