"""Views of preflights: what a job would do, without training."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.contract.documents import JobError
from shared.contract.preflight_report import Report, RowProgress, Sample
from shared.store.tables import PreflightRow

PreflightStatus = Literal["queued", "running", "succeeded", "failed"]


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
    progress: RowProgress | None = Field(description="Of a running preflight; null before and afterwards.")
    sample: Sample | None = Field(
        description="Of a large training file: an answer from some of its rows, long before the report. It stays."
    )
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
            "progress": row.progress if row.status == "running" else None,
            "sample": row.sample,
            "report": report,
        }
    )
