"""Views of evaluations and of their answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.chores.evaluations import SeenEvaluation
from shared.contract.documents import JobError
from shared.contract.evaluation import CreateEvaluation, EvaluationReport
from shared.contract.evaluation_run import ItemFault, PartName, StoredAnswer


class EvaluationView(View):
    """Subjects measured on the same items."""

    id: str = Field(examples=["eval_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["tunepool.evaluation"] = "tunepool.evaluation"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    name: str | None
    request: CreateEvaluation
    items: int | None = Field(description="Items of all sets; null until they have been read.")
    answered: int = Field(description="Answers so far, over all subjects.")
    device: str | None = Field(description="What it runs on, or ran on last.", examples=["CPU"])
    created_at: int
    finished_at: int | None
    error: JobError | None
    blocked_by: str | None = Field(examples=["host_memory_taken"], description="Why it waits.")
    detail: str | None
    report: EvaluationReport | None = Field(description="null until it has succeeded.")


class EvaluationPage(View):
    object: Literal["list"] = "list"
    data: list[EvaluationView]
    has_more: bool


class EvaluationItemView(View):
    """What one subject made of one item."""

    id: str = Field(description="For `after`.", examples=["items-12-0"])
    object: Literal["tunepool.evaluation.item"] = "tunepool.evaluation.item"
    part: PartName
    item: int
    line: int | None
    subject: str
    prompt: str
    reference: str | None
    answer: str | None
    finish_reason: Literal["stop", "length"] | None
    tokens: int | None
    seconds: float | None
    scores: dict[str, float]
    problems: dict[str, str] = Field(description="Measure -> why it has no value here.")
    slices: dict[str, str | None]
    error: ItemFault | None


class EvaluationItemPage(View):
    object: Literal["list"] = "list"
    data: list[EvaluationItemView]
    has_more: bool


def evaluation(seen: SeenEvaluation) -> EvaluationView:
    row = seen.row
    request = CreateEvaluation.model_validate(row.request, extra="ignore")
    # What is said of a queued one did not end it.
    error = None if row.error is None else JobError.model_validate(row.error)
    blocked_by, detail = _waits(seen, error)
    return EvaluationView(
        id=row.id,
        status=row.status,
        name=request.name,
        request=request,
        items=row.items,
        answered=row.answered,
        device=row.device,
        created_at=seconds(row.created_at),
        finished_at=maybe_seconds(row.finished_at),
        error=error if row.status == "failed" else None,
        blocked_by=blocked_by,
        detail=detail,
        report=None if row.report is None else EvaluationReport.model_validate(row.report, extra="ignore"),
    )


def _waits(seen: SeenEvaluation, error: JobError | None) -> tuple[str | None, str | None]:
    if seen.row.status != "queued":
        return None, None
    if error is not None:
        return error.code, error.message
    if seen.checking:
        return "file_check", "The file of items is being made into rows."
    if seen.ahead:
        return "earlier_evaluations", f"{seen.ahead} older evaluations are not finished; projects take turns."
    return "worker", "It waits for a worker to take it."


def answer(stored: StoredAnswer, *, subjects: list[str]) -> EvaluationItemView:
    return EvaluationItemView(
        id=f"{stored.part}-{stored.item}-{stored.subject}",
        part=stored.part,
        item=stored.item,
        line=stored.line,
        subject=subjects[stored.subject],
        prompt=stored.prompt,
        reference=stored.reference,
        answer=stored.answer,
        finish_reason=stored.finish_reason,
        tokens=stored.tokens,
        seconds=stored.seconds,
        scores=stored.scores,
        problems=stored.problems,
        slices=stored.slices,
        error=stored.error,
    )
