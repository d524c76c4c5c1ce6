"""Views of jobs and their attempts in OpenAI's form. Our own fields are under one key, `tunepool`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import Field

from api.views.queue_views import QueueState
from api.views.view import View, maybe_seconds, seconds
from shared.contract.documents import JobError, Manifest
from shared.contract.spec import DEFAULT_OBJECTIVE, OBJECTIVE_PARTS, JobSpec, ObjectiveName, numbers
from shared.store.lifecycle import JobStatus
from shared.store.tables import AdapterRow, AttemptRow, JobRow, MemberRow, TrackingRow
from shared.tenants.keys import Caller


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
    together: int | None = Field(
        default=None, description="Jobs that shared the device when it began, this one included; null: it was alone."
    )
    device_share: float | None = Field(
        default=None, description="Its part of the time that it had the device with others; null: all of it."
    )


class AdapterRef(View):
    id: str
    name: str
    bytes: int
    files: int


class ParentView(View):
    """The tuned model that a job goes on from."""

    id: str
    model: str = Field(description="Its `ft:` name; `model` of the job may be an alias.")
    init_from: Literal["continue", "merged"] | None = Field(description="How; null until the job is settled.")


class IntegrationState(View):
    """An integration of the job, and how far it is."""

    type: Literal["wandb", "mlflow", "tensorboard"]
    state: Literal["waiting", "done", "failed"] = Field(description="waiting: more is brought there, or tried again.")
    url: str | None = Field(description="Of the run at the tracker, once there is one.")
    file: str | None = Field(description="The event file for TensorBoard, by id.")
    last_step: int | None = Field(description="The newest step that is there.")
    error: str | None = Field(description="Why the last try failed.")
    failing_since: int | None


class JobExtension(View):
    """Ours: everything OpenAI's wire has no word for."""

    spec: dict[str, Any] | None = Field(
        default=None, description="The resolved JobSpec; null in a list that does not include it."
    )
    auto: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Values that were chosen, each with its reason; empty in a list that does not include them.",
    )
    queue: QueueState | None = None
    progress: dict[str, Any] | None = None
    attempts: list[Attempt] = Field(default_factory=list)
    adapter: AdapterRef | None = None
    usage: dict[str, float] = Field(default_factory=dict)
    suffix: str | None = Field(default=None, description="As it stands in the tuned model's name.")
    cancel_requested_at: int | None = Field(default=None, description="Since when a running job is being stopped.")
    pause_requested_at: int | None = None
    parent: ParentView | None = Field(default=None, description="Where `model` is a tuned one.")
    integrations: list[IntegrationState] | None = Field(
        default=None, description="In the order of the request, OpenAI's first; null in lists and where there is none."
    )
    superseded_by: str | None = Field(default=None, description="The newer job of its group that cancelled this one.")


# Nine tenths of a job. A list has them only where that is asked for, by these names.
Part = Literal["tunepool.spec", "tunepool.auto"]
WHOLE: Final[frozenset[Part]] = frozenset({"tunepool.spec", "tunepool.auto"})

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
        "suffix": "tickets",
        "cancel_requested_at": None,
        "pause_requested_at": None,
        "parent": None,
        "superseded_by": None,
        "integrations": None,
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


def job(
    row: JobRow,
    *,
    caller: Caller,
    attempts: Sequence[AttemptRow] = (),
    members: Mapping[int, Sequence[MemberRow]] | None = None,
    adapter: AdapterRow | None = None,
    queue: QueueState | None = None,
    trackings: Sequence[TrackingRow] = (),
    parts: Collection[Part] = WHOLE,
) -> FineTuningJob:
    """A job with what surrounds it. Lists leave attempts out, and of `parts` what nobody asks for."""
    request = row.request
    spec = None if row.spec is None else JobSpec.model_validate(row.spec, extra="ignore")  # a newer version's, maybe
    kind = (request.get("method") or {}).get("type", DEFAULT_OBJECTIVE)
    values = _hyperparameters(row, spec, kind)
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
                spec=row.spec if "tunepool.spec" in parts else None,
                auto=row.auto if "tunepool.auto" in parts else [],
                queue=queue,
                progress=row.progress,
                attempts=[
                    attempt(attempt_row, (members or {}).get(attempt_row.number, ())) for attempt_row in attempts
                ],
                adapter=None if adapter is None else _adapter_ref(adapter),
                usage={"device_seconds": round(row.device_seconds, 3)},
                suffix=row.suffix,
                cancel_requested_at=maybe_seconds(row.cancel_requested_at),
                pause_requested_at=maybe_seconds(row.pause_requested_at),
                parent=_parent(row, spec),
                superseded_by=row.superseded_by,
                integrations=[_integration(tracking) for tracking in trackings] or None,
            ),
        }
    )


def _parent(row: JobRow, spec: JobSpec | None) -> ParentView | None:
    if row.parent_id is None or row.parent_name is None:
        return None
    begins = None if spec is None or spec.parent is None else spec.parent.init_from
    return ParentView(id=row.parent_id, model=row.parent_name, init_from=begins)


def _hyperparameters(row: JobRow, spec: JobSpec | None, kind: ObjectiveName) -> dict[str, Any]:
    asked = _asked_hyperparameters(row.request)
    multiplier = asked.get("learning_rate_multiplier", "auto")
    if spec is None:
        return {
            "batch_size": asked.get("batch_size", "auto"),
            "learning_rate_multiplier": multiplier,
            "n_epochs": asked.get("n_epochs", "auto"),
            **{name: asked.get(name, "auto") for name in numbers(OBJECTIVE_PARTS[kind])},
        }
    values: dict[str, Any] = {
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        "n_epochs": spec.training.num_train_epochs,
    }
    return values | {name: getattr(spec.objective, name) for name in numbers(type(spec.objective))}


def _asked_hyperparameters(request: dict[str, Any]) -> dict[str, Any]:
    method = request.get("method") or {}
    part = method.get(method.get("type", ""), None) or {}
    return {**(request.get("hyperparameters") or {}), **part.get("hyperparameters", {})}


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
        members=[_member(member) for member in members],
        together=row.together,
        device_share=row.device_share,
    )


def _integration(row: TrackingRow) -> IntegrationState:
    return IntegrationState.model_validate(
        {
            "type": row.tracker,
            "state": row.state,
            "url": row.url,
            "file": row.file_id,
            "last_step": row.last_step,
            "error": row.error,
            "failing_since": maybe_seconds(row.failing_since),
        }
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
