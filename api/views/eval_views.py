"""Views of OpenAI's evals, their runs, and the output items of these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.chores import evals
from shared.chores.evals import RunStatus, SeenRun
from shared.contract.documents import JobError
from shared.contract.evals import (
    CompletionsDataSource,
    CreateEval,
    Criterion,
    DataSource,
    Metadata,
    RunOrder,
    measure_name,
)
from shared.contract.evaluation_run import ItemFault, StoredAnswer
from shared.store.tables import EvalRow


class EvalConfigView(View):
    """What items and answers look like, as one JSON Schema."""

    type: Literal["custom"] = "custom"
    item_shape: dict[str, Any] = Field(alias="schema")


class EvalView(View):
    """Criteria that runs are judged by."""

    id: str = Field(examples=["evals_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["eval"] = "eval"
    created_at: int
    name: str
    data_source_config: EvalConfigView
    testing_criteria: list[Criterion]
    metadata: Metadata | None


class EvalPage(View):
    object: Literal["list"] = "list"
    data: list[EvalView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedEval(View):
    object: Literal["eval.deleted"] = "eval.deleted"
    deleted: bool = True
    eval_id: str


class RunUsage(View):
    model_name: str
    invocation_count: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class CriterionResult(View):
    testing_criteria: str
    passed: int
    failed: int


class ResultCounts(View):
    total: int
    passed: int
    failed: int
    errored: int


class EvalRunView(View):
    """A run of an eval: items answered by a model, or with their answers, judged by the criteria."""

    id: str = Field(examples=["evalrun_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    object: Literal["eval.run"] = "eval.run"
    eval_id: str
    created_at: int
    status: RunStatus
    name: str
    model: str
    data_source: DataSource
    error: ItemFault | None
    metadata: Metadata | None
    report_url: str = Field(description="The path of this run.")
    result_counts: ResultCounts
    per_testing_criteria_results: list[CriterionResult]
    per_model_usage: list[RunUsage]


class EvalRunPage(View):
    object: Literal["list"] = "list"
    data: list[EvalRunView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedRun(View):
    object: Literal["eval.run.deleted"] = "eval.run.deleted"
    deleted: bool = True
    run_id: str


class CriterionScore(View):
    """What a criterion says of one answer. No value: 0, not passed, and why in `problem`."""

    name: str
    type: str
    score: float
    passed: bool
    problem: str | None = None


class RunMessage(View):
    role: str
    content: str


class SampleUsage(View):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class RunSample(View):
    """What was asked and answered."""

    input: list[RunMessage]
    output: list[RunMessage]
    finish_reason: str
    model: str
    usage: SampleUsage
    error: ItemFault | None
    temperature: float
    top_p: float
    max_completion_tokens: int
    seed: int


class OutputItemView(View):
    id: str = Field(examples=["outputitem_12"])
    object: Literal["eval.run.output_item"] = "eval.run.output_item"
    created_at: int
    run_id: str
    eval_id: str
    status: Literal["pass", "fail", "error"]
    datasource_item_id: int
    datasource_item: dict[str, Any]
    results: list[CriterionScore]
    sample: RunSample


class OutputItemPage(View):
    object: Literal["list"] = "list"
    data: list[OutputItemView]
    first_id: str | None
    last_id: str | None
    has_more: bool


def one_eval(row: EvalRow) -> EvalView:
    asked = CreateEval.model_validate(row.request, extra="ignore")
    config = asked.data_source_config
    shape: dict[str, Any] = {"type": "object", "properties": {"item": config.item_schema}, "required": ["item"]}
    if config.include_sample_schema:
        shape["properties"]["sample"] = {"type": "object"}
        shape["required"].append("sample")
    return EvalView(
        id=row.id,
        created_at=seconds(row.created_at),
        name=asked.name or "",
        data_source_config=EvalConfigView(schema=shape),
        testing_criteria=asked.testing_criteria,
        metadata=asked.metadata,
    )


def run(seen: SeenRun) -> EvalRunView:
    row, counts = seen.row, seen.counts
    order, kept, named = RunOrder.model_validate(row.request, extra="ignore"), row.run or {}, evals.run_id(row)
    error = JobError.model_validate(row.error) if row.error is not None and row.status == "failed" else None
    model = _model(order)
    used = RunUsage(
        model_name=model,
        invocation_count=counts.answered,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        total_tokens=counts.prompt_tokens + counts.completion_tokens,
    )
    return EvalRunView(
        id=named,
        eval_id=row.eval_id or "",
        created_at=seconds(row.created_at),
        status=evals.STATUSES[row.status],
        name=kept.get("name") or "",
        model=model,
        data_source=order.data_source,
        error=None if error is None else ItemFault(code=error.code, message=error.message),
        metadata=kept.get("metadata"),
        report_url=f"/v1/evals/{row.eval_id}/runs/{named}",
        result_counts=ResultCounts(
            total=counts.passed + counts.failed + counts.errored,
            passed=counts.passed,
            failed=counts.failed,
            errored=counts.errored,
        ),
        per_testing_criteria_results=[
            CriterionResult(testing_criteria=criterion.name, passed=passed, failed=failed)
            for criterion, (passed, failed) in zip(seen.asked.testing_criteria, counts.criteria, strict=True)
        ],
        per_model_usage=[used] if counts.answered else [],
    )


def _model(order: RunOrder) -> str:
    return order.data_source.model if isinstance(order.data_source, CompletionsDataSource) else ""


def output_item(stored: StoredAnswer, seen: SeenRun) -> OutputItemView:
    results = [_result(criterion, place, stored) for place, criterion in enumerate(seen.asked.testing_criteria)]
    unjudged = any(result.problem is not None for result in results)
    passed = all(result.passed for result in results)
    return OutputItemView(
        id=f"outputitem_{stored.item}",
        created_at=seconds(seen.row.created_at),
        run_id=evals.run_id(seen.row),
        eval_id=seen.row.eval_id or "",
        status="error" if unjudged else "pass" if passed else "fail",
        datasource_item_id=stored.item,
        datasource_item=stored.row or {},
        results=results,
        sample=_sample(stored, RunOrder.model_validate(seen.row.request, extra="ignore")),
    )


def _result(criterion: Criterion, place: int, stored: StoredAnswer) -> CriterionScore:
    score = stored.scores.get(measure_name(place))
    if score is None:
        why = stored.problems.get(measure_name(place), "It has no value here.")
        return CriterionScore(name=criterion.name, type=criterion.type, score=0.0, passed=False, problem=why)
    return CriterionScore(name=criterion.name, type=criterion.type, score=score, passed=score >= criterion.least)


def _sample(stored: StoredAnswer, order: RunOrder) -> RunSample:
    prompt, completion, settings = stored.prompt_tokens or 0, stored.tokens or 0, order.generation
    output = [] if stored.answer is None else [RunMessage(role="assistant", content=stored.answer)]
    return RunSample(
        input=[RunMessage(**message) for message in stored.asked or ()],
        output=output,
        finish_reason=stored.finish_reason or "stop",
        model=_model(order),
        usage=SampleUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion),
        error=stored.error,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_completion_tokens=settings.max_tokens,
        seed=settings.seed,
    )
