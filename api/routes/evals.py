"""/v1/evals: OpenAI's evals. Each run is an evaluation of the pool; nothing else answers or judges."""

from __future__ import annotations

import re
from typing import Final, Literal

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.views import eval_views
from api.views.eval_views import (
    DeletedEval,
    DeletedRun,
    EvalPage,
    EvalRunPage,
    EvalRunView,
    EvalView,
    OutputItemPage,
    OutputItemView,
)
from shared.chores import evals, evaluations, reach
from shared.contract.evals import CreateEval, CreateEvalRun, UpdateEval
from shared.errors import NotFound
from shared.store.paging import Order
from shared.tenants import audit

router = APIRouter(prefix="/v1/evals", tags=["evals"])

_ITEM: Final = re.compile(r"outputitem_([1-9][0-9]{0,8})")


@router.post("", response_model=EvalView, openapi_extra=body_of(CreateEval))
def create_eval(caller: JobsWriter, body: RawBody, door: DoorDep) -> EvalView:
    """Keep criteria and the shape of items; runs are judged by them."""
    wanted = parse(body, CreateEval, data=("data_source_config", "testing_criteria"))
    with door.session() as session:
        row = evals.create(session, wanted, project_id=caller.project_id)
        audit.record(session, caller, "eval.create", row.id)
        return eval_views.one_eval(row)


@router.get("", response_model=EvalPage)
def list_evals(
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    order_by: Literal["created_at", "updated_at"] = "created_at",
) -> EvalPage:
    """The project's evals."""
    by_update = order_by == "updated_at"
    with door.session() as session:
        rows, more = evals.page(
            session, project_id=caller.project_id, after=after, limit=limit, order=order, by_update=by_update
        )
        data = [eval_views.one_eval(row) for row in rows]
    return EvalPage(data=data, has_more=more, first_id=_first(data), last_id=_last(data))


@router.get("/{eval_id}", response_model=EvalView)
def retrieve_eval(eval_id: str, door: DoorDep, caller: JobsReader) -> EvalView:
    """An eval."""
    with door.session() as session:
        return eval_views.one_eval(evals.find(session, eval_id, project_id=caller.project_id))


@router.post("/{eval_id}", response_model=EvalView, openapi_extra=body_of(UpdateEval))
def update_eval(eval_id: str, caller: JobsWriter, body: RawBody, door: DoorDep) -> EvalView:
    """Change name or metadata; criteria stay, so that runs can be compared."""
    wanted = parse(body, UpdateEval)
    with door.session() as session:
        row = evals.change(session, eval_id, wanted, project_id=caller.project_id)
        audit.record(session, caller, "eval.update", row.id)
        return eval_views.one_eval(row)


@router.delete("/{eval_id}", response_model=DeletedEval)
def delete_eval(eval_id: str, door: DoorDep, caller: JobsWriter) -> DeletedEval:
    """Withdraw an eval with its runs and their answers."""
    with door.session() as session:
        row = evals.remove(session, eval_id, project_id=caller.project_id)
        audit.record(session, caller, "eval.delete", row.id)
    return DeletedEval(eval_id=eval_id)


@router.post("/{eval_id}/runs", response_model=EvalRunView, openapi_extra=body_of(CreateEvalRun))
def create_eval_run(eval_id: str, caller: JobsWriter, body: RawBody, door: DoorDep) -> EvalRunView:
    """Have a model answer items, or take the answers that come with them, and judge each by the criteria."""
    wanted = parse(body, CreateEvalRun, data=("data_source",))
    catalogue = door.catalogue
    with door.session() as session:
        seen = evals.submit(session, eval_id, wanted, project_id=caller.project_id, catalogue=catalogue)
        audit.record(session, caller, "eval.run.create", evals.run_id(seen.row))
        made = eval_views.run(seen)
    door.ring("cpu")
    return made


@router.get("/{eval_id}/runs", response_model=EvalRunPage)
def list_eval_runs(
    eval_id: str,
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["queued", "in_progress", "completed", "canceled", "failed"] | None = None,
) -> EvalRunPage:
    """The runs of an eval."""
    with door.session() as session:
        runs, more = evals.run_page(
            session, eval_id, project_id=caller.project_id, after=after, limit=limit, order=order, status=status
        )
        data = [eval_views.run(seen) for seen in runs]
    return EvalRunPage(data=data, has_more=more, first_id=_first(data), last_id=_last(data))


@router.get("/{eval_id}/runs/{run_id}", response_model=EvalRunView)
def retrieve_eval_run(eval_id: str, run_id: str, door: DoorDep, caller: JobsReader) -> EvalRunView:
    """A run with its counts so far."""
    with door.session() as session:
        return eval_views.run(evals.find_run(session, eval_id, run_id, project_id=caller.project_id))


@router.post("/{eval_id}/runs/{run_id}", response_model=EvalRunView)
def cancel_eval_run(eval_id: str, run_id: str, door: DoorDep, caller: JobsWriter) -> EvalRunView:
    """End a run that waits or works; the answers so far stay. OpenAI's older path of the cancellation."""
    return cancel_run(eval_id, run_id, door, caller)


@router.post("/{eval_id}/runs/{run_id}/cancel", response_model=EvalRunView)
def cancel_run(eval_id: str, run_id: str, door: DoorDep, caller: JobsWriter) -> EvalRunView:
    """End a run that waits or works; the answers so far stay. With the scope admin those of every project."""
    with door.session() as session:
        owner = reach.project_of(session, evaluations.EVALUATION, evals.chore_id(run_id), caller=caller)
        seen = evals.cancel_run(session, eval_id, run_id, project_id=owner)
        audit.record(session, caller, "eval.run.cancel", run_id, before={"project_id": owner})
        return eval_views.run(seen)


@router.delete("/{eval_id}/runs/{run_id}", response_model=DeletedRun)
def delete_eval_run(eval_id: str, run_id: str, door: DoorDep, caller: JobsWriter) -> DeletedRun:
    """Withdraw a run with its answers; one at work ends."""
    with door.session() as session:
        evals.remove_run(session, eval_id, run_id, project_id=caller.project_id)
        audit.record(session, caller, "eval.run.delete", run_id)
    return DeletedRun(run_id=run_id)


@router.get("/{eval_id}/runs/{run_id}/output_items", response_model=OutputItemPage)
def list_output_items(
    eval_id: str,
    run_id: str,
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["pass", "fail"] | None = None,
) -> OutputItemPage:
    """Answers of a run so far, each with what every criterion says of it; `fail` lists those in error, too."""
    last = None if after is None else _number(after, "after")
    passing = None if status is None else status == "pass"
    with door.session() as session:
        seen = evals.find_run(session, eval_id, run_id, project_id=caller.project_id)
        answers, more = evals.answers(session, seen, after=last, limit=limit, order=order, passing=passing)
        data = [eval_views.output_item(stored, seen) for stored in answers]
    return OutputItemPage(data=data, has_more=more, first_id=_first(data), last_id=_last(data))


@router.get("/{eval_id}/runs/{run_id}/output_items/{output_item_id}", response_model=OutputItemView)
def retrieve_output_item(
    eval_id: str, run_id: str, output_item_id: str, door: DoorDep, caller: JobsReader
) -> OutputItemView:
    """An answer of a run, with what every criterion says of it."""
    with door.session() as session:
        seen = evals.find_run(session, eval_id, run_id, project_id=caller.project_id)
        stored = evals.answer(session, seen, _number(output_item_id, "output_item_id"))
        return eval_views.output_item(stored, seen)


def _number(named: str, param: str) -> int:
    item = _ITEM.fullmatch(named)
    if item is None:
        raise NotFound(f"No output item '{named[:100]}'.", param=param)
    return int(item[1])


def _first(data: list[EvalView] | list[EvalRunView] | list[OutputItemView]) -> str | None:
    return data[0].id if data else None


def _last(data: list[EvalView] | list[EvalRunView] | list[OutputItemView]) -> str | None:
    return data[-1].id if data else None
