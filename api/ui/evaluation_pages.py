"""/ui/evaluations: figures of base and tuned models with their intervals, and their answers side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from api.deps import DoorDep
from api.file_rules import PURPOSES
from api.routes import evaluations as evaluation_routes
from api.routes import files as file_routes
from api.routes import models as model_routes
from api.ui import rendering, visits
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm
from api.views.evaluation_views import EvaluationItemView
from shared.contract.evaluation import ReportOfItems

router = APIRouter(prefix="/ui/evaluations", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
FILES: Final = 200
ANSWERS: Final = 50  # of a page of items: a question and its answers may be long
After = Annotated[str | None, Query(max_length=100)]


@dataclass
class ItemSide:
    """An item, and what each subject made of it."""

    item: EvaluationItemView
    answers: dict[str, EvaluationItemView] = field(default_factory=dict)

    @property
    def scores(self) -> list[str]:
        return sorted({name for answer in self.answers.values() for name in (*answer.scores, *answer.problems)})


@router.get("")
def evaluations_page(request: Request, door: DoorDep, visit: JobsVisitor, after: After = None) -> Response:
    caller = visit.caller
    listed = evaluation_routes.list_evaluations(door, caller, after=after, limit=ROWS)
    may_begin = all(caller.may(scope) for scope in ("jobs:write", "files:read", "models:read"))
    files = file_routes.list_files(door, caller, limit=FILES).data if may_begin else []
    models = model_routes.list_models(door, caller).data if may_begin else []
    return rendering.page(
        request,
        visit,
        "evaluations.html",
        evaluations=listed.data,
        more=listed.has_more,
        after=after,
        may_begin=may_begin,
        # What somebody uploaded: a job's own figures are no items.
        files=[file for file in files if file.status != "error" and file.purpose in PURPOSES],
        models=[model.id for model in models],
    )


@router.post("")
def begin_evaluation(door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """One model, or two on the same items."""
    first, second = form.must("subject"), form.get("second")
    items = form.get("items")
    body: dict[str, Any] = {
        "subjects": [first] if second is None else [first, second],
        "items": {"type": "suite", "suite": "general"} if items is None else {"type": "file", "file_id": items},
        "forgetting": items is not None and form.get("forgetting") == "yes",
    }
    body |= {} if second is None else {"against": first}
    body |= {} if form.get("name") is None else {"name": form.get("name")}
    made = evaluation_routes.create_evaluation(visit.caller, json.dumps(body).encode(), door)
    return visits.back(f"/ui/evaluations/{made.id}")


@router.get("/{evaluation_id}")
def evaluation_page(
    evaluation_id: str, request: Request, door: DoorDep, visit: JobsVisitor, after: After = None
) -> Response:
    evaluation = evaluation_routes.retrieve_evaluation(evaluation_id, door, visit.caller)
    items, rest = _items(door, visit, evaluation_id, after=after)
    reports: list[tuple[str, ReportOfItems]] = []
    if evaluation.report is not None:
        reports.append(("Measures", evaluation.report))
        if evaluation.report.forgetting is not None:
            reports.append(("Forgetting, on the suite general", evaluation.report.forgetting))
    return rendering.page(
        request,
        visit,
        "evaluation.html",
        evaluation=evaluation,
        subjects=list(evaluation.request.subjects),
        reports=reports,
        items=items,
        rest=rest,
        after=after,
    )


def _items(door: DoorDep, visit: JobsVisitor, evaluation_id: str, *, after: str | None) -> tuple[list[ItemSide], str]:
    """Whole items only, and after which answer the next page begins; empty: there is none."""
    listed = evaluation_routes.list_evaluation_items(
        evaluation_id, door, visit.caller, subject=None, after=after, limit=ANSWERS
    )
    sides: list[ItemSide] = []
    for answer in listed.data:
        if not sides or (sides[-1].item.part, sides[-1].item.item) != (answer.part, answer.item):
            sides.append(ItemSide(answer))
        sides[-1].answers[answer.subject] = answer
    if not listed.has_more or len(sides) < 2:
        return sides, ""
    sides.pop()  # it may be cut; an item has fewer answers than a page
    return sides, list(sides[-1].answers.values())[-1].id


@router.post("/{evaluation_id}/cancel")
def cancel_evaluation(evaluation_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    evaluation_routes.cancel_evaluation(evaluation_id, door, visit.caller)
    return visits.back(f"/ui/evaluations/{evaluation_id}")


@router.post("/{evaluation_id}/delete")
def delete_evaluation(evaluation_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    evaluation_routes.delete_evaluation(evaluation_id, door, visit.caller)
    return visits.back("/ui/evaluations")
