"""Views of models, adapters, merges and combinations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.contract.documents import JobError
from shared.contract.merge_request import CreateCombination, CreateMerge
from shared.contract.preflight_report import ServerVerdict
from shared.products.adapters import PublishedAdapter
from shared.settle.base_model_status import BaseModelStatus
from shared.store.tables import AliasRow, ExportRow, MergeRow


class ModelState(View):
    """How a model stands. Jobs of a base that is not ready are answered by 503 or 400, with this sentence."""

    state: Literal["resolving", "ready", "error"]
    detail: str | None = Field(description="What holds it up, or what to do.")
    warm: bool = Field(description="A playground has it in memory: it answers without loading anything first.")


class Model(View):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    tunepool: ModelState


class ModelPage(View):
    object: Literal["list"] = "list"
    data: list[Model]


class AdapterFile(View):
    name: str
    bytes: int
    sha256: str
    url: str = Field(description="Downloads this file, for a while: presigned on S3, signed by us on a local store.")


class AdapterView(View):
    id: str
    object: Literal["tunepool.adapter"] = "tunepool.adapter"
    name: str
    job_id: str | None = Field(description="null: combined of other adapters.")
    base_model: str
    created_at: int
    location: str = Field(
        description="The PEFT directory in the object store.", examples=["s3://bucket/proj_…/adapter"]
    )
    files: list[AdapterFile]
    servable: list[ServerVerdict] | None = Field(description="Which servers take it; null in lists.")


class AdapterPage(View):
    object: Literal["list"] = "list"
    data: list[AdapterView]
    has_more: bool


class ProductView(View):
    """What the CPU lane makes of tuned models, as a merge or an export shows it."""

    id: str
    object: str
    status: Literal["queued", "running", "succeeded", "failed"]
    request: Any
    base_model: str
    created_at: int
    finished_at: int | None
    error: JobError | None
    blocked_by: str | None = Field(examples=["host_memory_taken"], description="Why it waits to be tried again.")
    detail: str | None
    files: list[AdapterFile] = Field(description="Empty until it has succeeded.")


class Merge(ProductView):
    """A product made of adapters without training."""

    id: str = Field(examples=["merge_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.merge", "tunepool.combination"]
    request: CreateMerge | CreateCombination


class MergePage(View):
    object: Literal["list"] = "list"
    data: list[Merge]
    has_more: bool


def base_model(name: str, standing: BaseModelStatus, *, warm: bool) -> Model:
    """`name`: its own, or an alias."""
    state = ModelState(state=standing.state, detail=standing.detail, warm=warm)
    return Model(id=name, created=standing.created, owned_by=standing.owned_by, tunepool=state)


def model(adapter: PublishedAdapter, *, owner: str, warm: bool) -> Model:
    state = ModelState(state="ready", detail=None, warm=warm)
    return Model(id=adapter.name, created=seconds(adapter.created_at), owned_by=owner, tunepool=state)


def alias(row: AliasRow, *, owner: str, warm: bool) -> Model:
    state = ModelState(state="ready", detail=None, warm=warm)
    return Model(id=row.name, created=seconds(row.moved_at), owned_by=owner, tunepool=state)


def merge(row: MergeRow, *, files: list[AdapterFile]) -> Merge:
    merges = row.kind == "merge"
    return Merge(
        object="tunepool.merge" if merges else "tunepool.combination",
        request=(CreateMerge if merges else CreateCombination).model_validate(row.request, extra="ignore"),
        **product_fields(row, files=files),
    )


def product_fields(row: MergeRow | ExportRow, *, files: list[AdapterFile]) -> dict[str, Any]:
    """The fields that merges and exports share."""
    # What is said of a queued one did not end it.
    error = None if row.error is None else JobError.model_validate(row.error)
    waits_for = error if row.status == "queued" else None
    return {
        "id": row.id,
        "status": row.status,
        "base_model": row.base_model,
        "created_at": seconds(row.created_at),
        "finished_at": maybe_seconds(row.finished_at),
        "error": error if row.status == "failed" else None,
        "blocked_by": None if waits_for is None else waits_for.code,
        "detail": None if waits_for is None else waits_for.message,
        "files": files,
    }
