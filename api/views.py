"""Views in OpenAI's form, and the functions that make them of rows. Our own fields are under one key, `tunepool`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.plan_cache import Look
from shared.contract.documents import JobError, Manifest
from shared.contract.spec import DEFAULT_OBJECTIVE, CreateCombination, CreateMerge, JobSpec, numbers
from shared.plan.verdicts import Verdict
from shared.products.adapters import PublishedAdapter
from shared.store.lifecycle import JobStatus
from shared.store.tables import AdapterRow, AttemptRow, CheckpointRow, EventRow, FileRow, JobRow, MemberRow, MergeRow
from shared.tenants.keys import Caller


class View(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorBody(View):
    message: str = Field(description="What is wrong, with field, value and remedy.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["training_file"])
    code: str | None = Field(examples=["missing_required_parameter"])


class ErrorEnvelope(View):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "Missing required parameter: 'training_file'.",
                        "type": "invalid_request_error",
                        "param": "training_file",
                        "code": "missing_required_parameter",
                    }
                }
            ]
        }
    )

    error: ErrorBody


class File(View):
    id: str = Field(examples=["file-0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None
    expires_at: int | None = None


class FilePage(View):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(View):
    id: str
    object: str
    deleted: bool = True


class QueueState(View):
    """Why a queued job waits, and what would unblock it."""

    position: int | None = Field(description="1-based place in the effective order of the pool.")
    jobs_ahead: int | None
    blocked_by: str | None = Field(examples=["NO_FREE_DEVICE"])
    detail: str
    eta_low: int | None = Field(default=None, description="Start at best; jobs still to come may delay it.")
    eta_high: int | None = Field(default=None, description="Start at worst, as far as running jobs have limits.")
    first_eta_low: int | None = Field(default=None, description="The first forecast that was made.")
    first_eta_high: int | None = None
    drift_seconds: int | None = Field(
        default=None, description="How much later than first forecast it starts by now (earlier: negative)."
    )
    as_of: int = Field(description="When the plan was made that says so; a plan serves all for about a second.")


class MemberView(View):
    """A further host of an attempt of a job on several; the attempt itself tells of the first."""

    node: int
    worker_id: str
    host: str
    devices: list[str]
    phase: str = Field(examples=["training"])
    exit_code: int | None = Field(description="Of ranks that ended by themselves.")
    error: dict[str, Any] | None


class Attempt(View):
    number: int
    phase: str
    outcome: str | None
    started_at: int
    ended_at: int | None
    devices: list[str]
    micro_batch_size: int | None
    exit_code: int | None
    peak_memory_bytes: int | None
    error: dict[str, Any] | None
    members: list[MemberView] = Field(default_factory=list, description="The further hosts of a job on several.")


class AdapterRef(View):
    id: str
    name: str
    bytes: int
    files: int


class JobExtension(View):
    """Ours: everything OpenAI's wire has no word for."""

    spec: dict[str, Any] | None = Field(default=None, description="The resolved JobSpec.")
    auto: list[dict[str, Any]] = Field(
        default_factory=list, description="Values that were chosen, each with its reason."
    )
    queue: QueueState | None = None
    progress: dict[str, Any] | None = None
    attempts: list[Attempt] = Field(default_factory=list)
    adapter: AdapterRef | None = None
    usage: dict[str, float] = Field(default_factory=dict)


_JOB_ID = "0193a1b2c3d4e5f60718293a4b5c6d7e"
_VALUES = {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 2}
JOB_EXAMPLE: Final[dict[str, Any]] = {
    "id": f"ftjob-{_JOB_ID}",
    "object": "fine_tuning.job",
    "created_at": 1763900000,
    "error": None,
    "fine_tuned_model": f"ft:smollm2-135m-instruct:default:tickets:{_JOB_ID}",
    "finished_at": 1763900120,
    "hyperparameters": _VALUES,
    "model": "smollm2-135m-instruct",
    "organization_id": "org_0193a1b2c3d4e5f60718293a4b5c6d70",
    "result_files": ["file-0193a1b2c3d4e5f60718293a4b5c6d7f"],
    "seed": 42,
    "status": "succeeded",
    "trained_tokens": 51200,
    "training_file": "file-0193a1b2c3d4e5f60718293a4b5c6d71",
    "validation_file": None,
    "estimated_finish": None,
    "integrations": None,
    "metadata": {"git_sha": "deadbeef"},
    "method": {"type": "supervised", "supervised": {"hyperparameters": _VALUES}},
    "tunepool": {
        "spec": None,
        "auto": [{"field": "training.learning_rate", "value": 0.0002, "reason": "usual for LoRA of this rank"}],
        "queue": None,
        "progress": {"step": 100, "total_steps": 100, "train_loss": 0.12},
        "attempts": [],
        "adapter": None,
        "usage": {"device_seconds": 98.4},
    },
}


class FineTuningJob(View):
    id: str = Field(examples=["ftjob-0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None = None
    integrations: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None
    method: dict[str, Any] | None = None
    tunepool: JobExtension


class JobPage(View):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class Event(View):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventPage(View):
    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool


class Checkpoint(View):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class CheckpointPage(View):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Model(View):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


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


class AdapterPage(View):
    object: Literal["list"] = "list"
    data: list[AdapterView]
    has_more: bool


class Merge(View):
    """A product made of adapters without training."""

    id: str = Field(examples=["merge_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.merge", "tunepool.combination"]
    status: Literal["queued", "running", "succeeded", "failed"]
    request: CreateMerge | CreateCombination
    base_model: str
    created_at: int
    finished_at: int | None
    error: JobError | None
    blocked_by: str | None = Field(examples=["host_memory_taken"], description="Why it waits to be tried again.")
    detail: str | None
    files: list[AdapterFile] = Field(description="Empty until it has succeeded.")


class MergePage(View):
    object: Literal["list"] = "list"
    data: list[Merge]
    has_more: bool


# A download's answer: bytes, whatever they are.
BYTES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def seconds(moment: datetime) -> int:
    """Unix seconds, as every timestamp of the wire."""
    return int(moment.timestamp())


def maybe_seconds(moment: datetime | None) -> int | None:
    return None if moment is None else seconds(moment)


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
        }
    )


def job(
    row: JobRow,
    *,
    caller: Caller,
    attempts: Sequence[AttemptRow] = (),
    members: Mapping[int, Sequence[MemberRow]] | None = None,
    adapter: AdapterRow | None = None,
    queue: QueueState | None = None,
) -> FineTuningJob:
    """A job with what surrounds it. Lists leave attempts out."""
    request = row.request
    spec = None if row.spec is None else JobSpec.model_validate(row.spec, extra="ignore")  # a newer version's, maybe
    values = _hyperparameters(row, spec)
    kind = (request.get("method") or {}).get("type", DEFAULT_OBJECTIVE)
    return FineTuningJob.model_validate(
        {
            "id": row.id,
            "created_at": seconds(row.created_at),
            "error": row.error,
            "fine_tuned_model": row.fine_tuned_model,
            "finished_at": maybe_seconds(row.finished_at),
            "hyperparameters": values if kind == DEFAULT_OBJECTIVE else {},
            "model": row.model,
            "organization_id": caller.organization_id,
            "result_files": [row.result_file] if row.result_file else [],
            "seed": row.seed,
            "status": row.status,
            "trained_tokens": row.trained_tokens,
            "training_file": row.training_file,
            "validation_file": row.validation_file,
            "estimated_finish": maybe_seconds(row.estimated_finish),
            "integrations": request.get("integrations"),
            "metadata": row.job_metadata,
            "method": {"type": kind, kind: {"hyperparameters": values}},
            "tunepool": JobExtension(
                spec=row.spec,
                auto=row.auto,
                queue=queue,
                progress=row.progress,
                attempts=[attempt(one, (members or {}).get(one.number, ())) for one in attempts],
                adapter=None if adapter is None else _adapter_ref(adapter),
                usage={"device_seconds": round(row.device_seconds, 3)},
            ),
        }
    )


def _hyperparameters(row: JobRow, spec: JobSpec | None) -> dict[str, Any]:
    asked = _asked_hyperparameters(row.request)
    multiplier = asked.get("learning_rate_multiplier", "auto")
    if spec is None:
        return {
            "batch_size": asked.get("batch_size", "auto"),
            "learning_rate_multiplier": multiplier,
            "n_epochs": asked.get("n_epochs", "auto"),
        }
    values: dict[str, Any] = {
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        "n_epochs": spec.training.num_train_epochs,
    }
    return values | {name: getattr(spec.objective, name) for name in numbers(spec.objective)}


def _asked_hyperparameters(request: dict[str, Any]) -> dict[str, Any]:
    method = request.get("method") or {}
    part = method.get(method.get("type", ""), None) or {}
    return {**(request.get("hyperparameters") or {}), **part.get("hyperparameters", {})}


def queue_state(look: Look, row: JobRow) -> QueueState:
    """What the latest plan says of a queued job."""
    verdict = look.verdict
    state = QueueState(
        position=None,
        jobs_ahead=None,
        blocked_by=None,
        detail="Queued a moment ago; its place in the queue is known with the next plan.",
        first_eta_low=maybe_seconds(row.first_eta_low),
        first_eta_high=maybe_seconds(row.first_eta_high),
        as_of=seconds(look.as_of),
    )
    if look.starting:
        starting = "A device is free; a worker is about to start this job."
        return state.model_copy(update={"position": 1, "jobs_ahead": 0, "detail": starting})
    if verdict is None:
        return state
    return state.model_copy(
        update={
            "position": verdict.position,
            "jobs_ahead": verdict.jobs_ahead,
            "blocked_by": verdict.blocked_by,
            "detail": verdict.detail,
            "eta_low": maybe_seconds(verdict.eta_low),
            "eta_high": maybe_seconds(verdict.eta_high),
            "drift_seconds": _drift(verdict, row),
        }
    )


def _drift(verdict: Verdict, row: JobRow) -> int | None:
    """The drift of the worst case where both forecasts have one, else of the best case."""
    for now, first in ((verdict.eta_high, row.first_eta_high), (verdict.eta_low, row.first_eta_low)):
        if now is not None and first is not None:
            return round((now - first).total_seconds())
    return None


def etag(version: int, look: Look | None) -> str:
    """Of a job: its row's version, and its place. A forecast slides with the clock; only whole minutes of it count."""
    if look is None:
        return f'"{version}"'
    told, verdict = [str(look.starting)], look.verdict
    if verdict is not None:
        minutes = [moment and int(moment.timestamp()) // 60 for moment in (verdict.eta_low, verdict.eta_high)]
        told += [repr((verdict.position, verdict.jobs_ahead, verdict.blocked_by, verdict.detail, minutes))]
    return f'"{version}-{hashlib.sha256("".join(told).encode()).hexdigest()[:16]}"'


def attempt(row: AttemptRow, members: Sequence[MemberRow] = ()) -> Attempt:
    return Attempt(
        number=row.number,
        phase=row.phase,
        outcome=row.outcome,
        started_at=seconds(row.started_at),
        ended_at=maybe_seconds(row.ended_at),
        devices=row.device_ids,
        micro_batch_size=row.micro_batch_size,
        exit_code=row.exit_code,
        peak_memory_bytes=row.peak_bytes,
        error=row.error,
        members=[_member(one) for one in members],
    )


def _member(row: MemberRow) -> MemberView:
    return MemberView(
        node=row.node,
        worker_id=row.worker_id,
        host=row.host,
        devices=row.device_ids,
        phase=row.phase,
        exit_code=row.exit_code,
        error=row.error,
    )


def _adapter_ref(row: AdapterRow) -> AdapterRef:
    files = Manifest.read(row.manifest).files
    return AdapterRef(id=row.id, name=row.name, bytes=sum(entry.bytes for entry in files), files=len(files))


def event(row: EventRow) -> Event:
    return Event.model_validate(
        {
            "id": row.id,
            "created_at": seconds(row.created_at),
            "level": row.level,
            "message": row.message,
            "type": row.type,
            "data": row.data,
        }
    )


def checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        id=row.id,
        created_at=seconds(row.created_at),
        fine_tuned_model_checkpoint=row.name,
        fine_tuning_job_id=row.job_id,
        step_number=row.step,
        metrics=row.metrics,
    )


def model(adapter: PublishedAdapter, *, owner: str) -> Model:
    return Model(id=adapter.name, created=seconds(adapter.created_at), owned_by=owner)


def merge(row: MergeRow, *, files: list[AdapterFile]) -> Merge:
    merges = row.kind == "merge"
    # What is said of a queued one did not end it.
    error = None if row.error is None else JobError.model_validate(row.error)
    waits_for = error if row.status == "queued" else None
    return Merge(
        id=row.id,
        object="tunepool.merge" if merges else "tunepool.combination",
        status=row.status,
        request=(CreateMerge if merges else CreateCombination).model_validate(row.request, extra="ignore"),
        base_model=row.base_model,
        created_at=seconds(row.created_at),
        finished_at=None if row.finished_at is None else seconds(row.finished_at),
        error=error if row.status == "failed" else None,
        blocked_by=None if waits_for is None else waits_for.code,
        detail=None if waits_for is None else waits_for.message,
        files=files,
    )
