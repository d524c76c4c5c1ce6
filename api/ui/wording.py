"""States of a job in words: what it does, why it waits, why it failed, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from api.views.job_views import Attempt, FineTuningJob

_WORDS: Final = {
    "validating_files": "checking files",
    "queued": "waiting",
    "running": "training",
    "paused": "paused",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
_PHASES: Final = {
    "leased": "A worker has taken the job and prepares it.",
    "staging": "The base model and the rows are brought to the device.",
    "training": "The model is being trained.",
    "publishing": "Training is over; the adapter is being stored.",
}
UNFINISHED: Final = frozenset({"validating_files", "queued", "running", "paused"})


class JobHeadline(NamedTuple):
    """What is the matter with a job, in a headline and a sentence."""

    headline: str
    detail: str
    tone: str  # a class of the style sheet


def status_word(status: str) -> str:
    return _WORDS.get(status, status)


def sentence(words: str) -> str:
    """The plan's reason, which the command line has after a colon, as a sentence of its own."""
    words = words.strip()
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith(('.', '!', '?')) or not words else '.'}"


def situation(job: FineTuningJob) -> JobHeadline:
    """Why the job stands where it stands."""
    return _SITUATIONS[job.status](job)


def _checking(_: FineTuningJob) -> JobHeadline:
    return JobHeadline("Its files are being checked", "Nothing trains before every line was found good.", "wait")


def _paused(_: FineTuningJob) -> JobHeadline:
    return JobHeadline("Paused", "Resume it, and it goes on from its last checkpoint.", "idle")


def _succeeded(job: FineTuningJob) -> JobHeadline:
    return JobHeadline("Trained and published", f"The model is {job.fine_tuned_model}.", "good")


def _cancelled(job: FineTuningJob) -> JobHeadline:
    newer = job.tunepool.superseded_by
    detail = f"The newer job {newer} of its group took its place." if newer else "It was ended on request."
    return JobHeadline("Cancelled", detail, "idle")


def _queued(job: FineTuningJob) -> JobHeadline:
    queue = job.tunepool.queue
    if queue is None:
        return JobHeadline("Waiting for a device", "Its place is known with the next plan.", "wait")
    if queue.position == 1 and queue.blocked_by is None:
        return JobHeadline("About to start", sentence(queue.detail), "wait")
    if queue.blocked_by == "BASE_MODEL_FETCHING":
        words = "The job starts by itself once it is there. While a download is converted there is no progress to see"
        return JobHeadline("Its base model is being fetched", f"{words}: {queue.detail}.", "wait")
    place = f"Waiting: number {queue.position} in the queue" if queue.position else "Waiting for a device"
    return JobHeadline(place, sentence(queue.detail), "wait")


def _running(job: FineTuningJob) -> JobHeadline:
    ours = job.tunepool
    if ours.cancel_requested_at is not None:
        return JobHeadline("Being cancelled", "The trainer is asked to stop; this takes seconds.", "wait")
    if ours.pause_requested_at is not None:
        return JobHeadline("Being paused", "The trainer saves a checkpoint and gives its device back.", "wait")
    if ours.queue is not None and ours.queue.blocked_by == "CLUSTER":
        return JobHeadline("Waiting for the cluster", sentence(ours.queue.detail), "wait")
    latest = ours.attempts[-1] if ours.attempts else None
    phase = latest.phase if latest is not None else "leased"
    step, total = progress(job)
    headline = f"Training: step {step:,} of {total:,}" if total else "Starting"
    again = f" This is attempt {latest.number}." if latest is not None and latest.number > 1 else ""
    return JobHeadline(headline, _PHASES.get(phase, "") + again, "busy")


def _failed(job: FineTuningJob) -> JobHeadline:
    error = job.error
    if error is None:
        return JobHeadline("Failed", "No reason was recorded.", "bad")
    place = f" (field {error.param})" if error.param else ""
    return JobHeadline(f"Failed: {error.code}{place}", error.message, "bad")


_SITUATIONS: Final[dict[str, Callable[[FineTuningJob], JobHeadline]]] = {
    "validating_files": _checking,
    "queued": _queued,
    "running": _running,
    "paused": _paused,
    "succeeded": _succeeded,
    "failed": _failed,
    "cancelled": _cancelled,
}


def progress(job: FineTuningJob) -> tuple[int, int]:
    """Steps done, and in all; 0 when not known."""
    progress = job.tunepool.progress or {}
    return int(progress.get("step") or 0), int(progress.get("total_steps") or 0)


class AttemptSpan(NamedTuple):
    """An attempt on the time line, in per cent of the whole."""

    attempt: Attempt
    start: float
    width: float


def time_line(job: FineTuningJob, *, now: float) -> list[AttemptSpan]:
    """The attempts side by side between the first start and now or the last end."""
    attempts = job.tunepool.attempts
    if not attempts:
        return []
    first = attempts[0].started_at
    last = max(attempt.ended_at or now for attempt in attempts)
    whole = max(1.0, last - first)
    return [
        AttemptSpan(
            attempt,
            100 * (attempt.started_at - first) / whole,
            max(0.6, 100 * ((attempt.ended_at or now) - attempt.started_at) / whole),
        )
        for attempt in attempts
    ]
