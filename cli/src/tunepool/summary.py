"""A job in a few lines for a person: where it stands, why, and what became of it. Programs take `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tunepool.watching import ours, place, time_left

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob


def of_job(job: FineTuningJob) -> str:
    """Lines of a name and what it is; what is not known yet has no line."""
    lines = [(name, value) for name, value in _facts(job, ours(job)) if value]
    width = max(len(name) for name, _ in lines)
    facts = [f"{name:<{width}}  {value}" for name, value in lines]
    return "\n".join([*facts, f"Everything that the server tells: tunepool --json jobs show {job.id}"])


def _facts(job: FineTuningJob, extension: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    queue = extension.get("queue") or {}
    yield "job", job.id
    yield "status", _status(job, extension, queue)
    yield "because", queue.get("detail")
    yield "model", job.model
    yield "tuned model", job.fine_tuned_model
    yield "files", ", ".join(filter(None, (job.training_file, job.validation_file)))
    yield "progress", _progress(job, extension.get("progress") or {})
    yield "error", None if job.error is None else f"{job.error.message} ({job.error.code})"
    yield "superseded by", extension.get("superseded_by")
    for tracked in extension.get("integrations") or ():
        yield tracked["type"], _tracking(tracked)
    yield "created", _moment(job.created_at)
    yield "ended", _moment(job.finished_at)
    yield "metadata", ", ".join(f"{key}={value}" for key, value in (job.metadata or {}).items())
    used = (extension.get("usage") or {}).get("device_seconds")
    yield "used", None if not used else f"{used:.1f} device-seconds"


def _status(job: FineTuningJob, extension: dict[str, Any], queue: dict[str, Any]) -> str:
    if job.status == "running" and extension.get("cancel_requested_at"):
        return "running, is being cancelled"
    if job.status in ("running", "validating_files") and extension.get("pause_requested_at"):
        return f"{job.status}, is to be paused"
    return place(queue) or job.status


def _progress(job: FineTuningJob, progress: dict[str, Any]) -> str | None:
    if progress.get("step") is None:
        return None
    words = [f"step {progress['step']} of {progress.get('total_steps', '?')}"]
    losses = {"loss": progress.get("train_loss"), "validation loss": progress.get("valid_loss")}
    words += [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    if (left := time_left(job)) != "-":
        words.append(f"{left} left")
    return ", ".join(words)


def _tracking(tracked: dict[str, Any]) -> str:
    step = tracked.get("last_step")
    words = (
        tracked["state"],
        step and f"to step {step}",
        tracked.get("url") or tracked.get("file"),
        tracked.get("error"),
    )
    return ", ".join(word for word in words if word)


def _moment(seconds: int | None) -> str | None:
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%d %H:%M:%SZ}"
