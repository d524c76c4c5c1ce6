"""/v1/tunepool/evaluations: base, tuned models and checkpoints measured on the same items."""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import APIRouter, Query

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.views import evaluation_views, view
from api.views.evaluation_views import EvaluationItemPage, EvaluationPage, EvaluationView
from shared.chores import evaluations, reach
from shared.chores.evaluations import AnswerKey
from shared.contract.evaluation import CreateEvaluation
from shared.errors import Invalid
from shared.tenants import audit

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

BODY: Final = body_of(
    CreateEvaluation,
    example={
        "subjects": ["smollm2-135m-instruct", "ft:smollm2-135m-instruct:acme:tickets:0193a1b2"],
        "against": "smollm2-135m-instruct",
        "items": {"type": "file", "file_id": "file-0193a1b2c3d4e5f60718293a4b5c6d7e"},
        "measures": [
            {"type": "loss", "name": "loss"},
            {"type": "exact_match", "name": "right", "ignore_case": True},
        ],
    },
)
_ITEM: Final = re.compile(r"(items|forgetting)-(\d{1,9})-(\d{1,3})")


@router.post("/evaluations", response_model=EvaluationView, openapi_extra=BODY)
def create_evaluation(caller: JobsWriter, body: RawBody, door: DoorDep) -> EvaluationView:
    """Have subjects (base models, tuned models, checkpoints) measured on the same items.

    It waits for a worker as other work does; `blocked_by` says why it waits. Answers can be listed as they come.
    """
    wanted = parse(body, CreateEvaluation)
    catalogue = door.catalogue
    with door.session() as session:
        row = evaluations.submit(session, wanted, project_id=caller.project_id, catalogue=catalogue)
        audit.record(session, caller, "evaluation.create", row.id)
        seen = evaluations.seen(session, row)
    door.ring("cpu")
    return evaluation_views.evaluation(seen)


@router.get("/evaluations", response_model=EvaluationPage)
def list_evaluations(
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
) -> EvaluationPage:
    """The project's evaluations, newest first."""
    with door.session() as session:
        rows, more = evaluations.page(session, project_id=caller.project_id, after=after, limit=limit)
        data = [evaluation_views.evaluation(evaluations.seen(session, row)) for row in rows]
    return EvaluationPage(data=data, has_more=more)


@router.get("/evaluations/{evaluation_id}", response_model=EvaluationView)
def retrieve_evaluation(evaluation_id: str, door: DoorDep, caller: JobsReader) -> EvaluationView:
    """An evaluation; once it has succeeded, with its report."""
    with door.session() as session:
        row = evaluations.find(session, evaluation_id, project_id=caller.project_id)
        return evaluation_views.evaluation(evaluations.seen(session, row))


@router.get("/evaluations/{evaluation_id}/items", response_model=EvaluationItemPage)
def list_evaluation_items(
    evaluation_id: str,
    door: DoorDep,
    caller: JobsReader,
    subject: Annotated[str | None, Query(max_length=300)] = None,
    after: After = None,
    limit: Limit = 20,
) -> EvaluationItemPage:
    """Answers so far with their scores, item by item; those of stored `subject`, if it is named."""
    with door.session() as session:
        row = evaluations.find(session, evaluation_id, project_id=caller.project_id)
        subjects = list(row.request["subjects"])
        place = None if subject is None else _place(subject, subjects)
        answers, more = evaluations.answers_page(session, row.id, subject=place, after=_key(after), limit=limit)
    data = [evaluation_views.answer(stored, subjects=subjects) for stored in answers]
    return EvaluationItemPage(data=data, has_more=more)


@router.post("/evaluations/{evaluation_id}/cancel", response_model=EvaluationView)
def cancel_evaluation(evaluation_id: str, door: DoorDep, caller: JobsWriter) -> EvaluationView:
    """End an evaluation that has not ended, as a key with the scope admin may in every project; its answers stay."""
    with door.session() as session:
        owner = reach.project_of(session, evaluations.EVALUATION, evaluation_id, caller=caller)
        row = evaluations.cancel(session, evaluation_id, project_id=owner)
        audit.record(session, caller, "evaluation.cancel", row.id, before={"project_id": row.project_id})
        return evaluation_views.evaluation(evaluations.seen(session, row))


@router.delete("/evaluations/{evaluation_id}", response_model=view.Deleted)
def delete_evaluation(evaluation_id: str, door: DoorDep, caller: JobsWriter) -> view.Deleted:
    """Withdraw an evaluation with all its answers; one that runs ends."""
    with door.session() as session:
        row = evaluations.remove(session, evaluation_id, project_id=caller.project_id)
        audit.record(session, caller, "evaluation.delete", row.id, before={"status": row.status})
    return view.Deleted(id=evaluation_id, object="tunepool.evaluation")


def _place(subject: str, subjects: list[str]) -> int:
    if subject not in subjects:
        raise Invalid(f"'{subject[:100]}' is no subject of this evaluation; name one of its subjects.", param="subject")
    return subjects.index(subject)


def _key(after: str | None) -> AnswerKey | None:
    if after is None:
        return None
    named = _ITEM.fullmatch(after)
    if named is None:
        raise Invalid("'after' must be the id of an item, such as items-12-0.", param="after")
    return named[1], int(named[2]), int(named[3])
