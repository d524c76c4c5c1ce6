"""Views of preflights: what a job would do, without training."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from api.views import JobError, View, maybe_seconds, seconds
from shared.contract.events import TokenReport
from shared.store.tables import PreflightRow

PreflightStatus = Literal["queued", "running", "succeeded", "failed"]


class CheckedFile(View):
    """What the check of a file has found; every figure is null until the file is read."""

    id: str
    format: str | None = None
    shape: str | None = Field(default=None, description="As uploaded: chat, sharegpt, alpaca …")
    rows: int | None = None
    bytes: int | None = None
    characters: int | None = None
    duplicate_rows: int | None = None
    dropped_columns: list[str] = Field(default_factory=list)
    problem_count: int | None = None
    problems: list[dict[str, Any]] = Field(
        default_factory=list, description="The first 20: line, column, param, code, message."
    )
    warnings: list[dict[str, Any]] = Field(default_factory=list)


class Memory(View):
    """Bytes of one device at the peak."""

    predicted_bytes: int
    upper_bytes: int = Field(description="Nine of ten such jobs need no more.")
    evaluation_bytes: int
    sure: str
    measurements: int = Field(description="Finished jobs behind the prediction; 0: the formula alone.")
    terms: dict[str, int]


class PreflightRun(View):
    steps: int
    steps_per_epoch: int
    rows: int = Field(description="Rows that teach something.")
    tokens: int = Field(description="Over the whole run.")


class Time(View):
    """Seconds of training, without waiting, loading and publishing."""

    device: str
    expected: float
    low: float
    high: float
    basis: str


class DeviceFit(View):
    id: str
    name: str
    kind: str
    fits: bool
    needed_bytes: int
    offered_bytes: int
    reason: str


class Report(View):
    ok: bool = Field(description="A job with this body would begin to train.")
    files: dict[str, CheckedFile]
    refusal: JobError | None = Field(description="Why the job would fail before it trains.")
    spec: dict[str, Any] | None = Field(default=None, description="The resolved JobSpec.")
    auto: list[dict[str, Any]] = Field(default_factory=list)
    tokens: TokenReport | None = None
    run: PreflightRun | None = None
    memory: Memory | None = None
    time: Time | None = Field(
        default=None, description="Null: no job of this kind has finished, and the device is not known."
    )
    devices: list[DeviceFit] = Field(default_factory=list)


class Preflight(View):
    id: str = Field(examples=["preflight_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.preflight"] = "tunepool.preflight"
    status: PreflightStatus
    created_at: int
    finished_at: int | None
    model: str
    training_file: str
    validation_file: str | None
    error: JobError | None = Field(description="Why there is no answer; a fault of the job's is in report.refusal.")
    report: Report | None


class PreflightPage(View):
    object: Literal["list"] = "list"
    data: list[Preflight]
    has_more: bool


SHOWN_IN_LISTS: Final = frozenset({"ok", "files", "refusal"})


def preflight(row: PreflightRow, *, whole: bool = True) -> Preflight:
    """A preflight; lists leave out all but the verdict."""
    report = row.report
    if report is not None and not whole:
        report = {name: value for name, value in report.items() if name in SHOWN_IN_LISTS}
    return Preflight.model_validate(
        {
            "id": row.id,
            "status": row.status,
            "created_at": seconds(row.created_at),
            "finished_at": maybe_seconds(row.finished_at),
            "model": row.request["model"],
            "training_file": row.training_file,
            "validation_file": row.validation_file,
            "error": row.error,
            "report": report,
        }
    )
