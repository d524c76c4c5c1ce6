"""Verbs of OpenAI's evals: an eval keeps criteria, and each of its runs is an evaluation (`shared/chores/evaluations`).

A run's id on the wire is that of its evaluation with another prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Float, Select, and_, cast, false, func, select, true, update
from sqlalchemy.orm import Session

from shared.chores import evaluations
from shared.contract.evals import (
    NO_MODEL,
    CompletionsDataSource,
    CreateEval,
    CreateEvalRun,
    Criterion,
    RunOrder,
    UpdateEval,
    measure_name,
    measures,
)
from shared.contract.evaluation import GenerationSettings
from shared.contract.evaluation_run import StoredAnswer
from shared.errors import Conflict, Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.rows import run_items
from shared.rows.measuring import Scorer
from shared.settle.catalogue import Catalogue
from shared.store import paging
from shared.store.locks import one_at_a_time
from shared.store.tables import EvalRow, EvaluationAnswerRow, EvaluationRow

MAX_EVALS: Final = 1000  # of one project
_RUN: Final = ("evalrun_", "eval_")
RunStatus = Literal["queued", "in_progress", "completed", "failed", "canceled"]
STATUSES: Final[dict[str, RunStatus]] = {  # ours -> the wire's
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "canceled",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Answers of a run so far: those that passed every criterion, by criterion, and what a model used."""

    passed: int
    failed: int
    errored: int
    criteria: tuple[tuple[int, int], ...]  # passed, failed
    answered: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class SeenRun:
    row: EvaluationRow
    asked: CreateEval
    counts: Counts


def run_id(row: EvaluationRow) -> str:
    """As the wire names a run."""
    return _RUN[0] + row.id.removeprefix(_RUN[1])


def chore_id(named: str) -> str:
    """The evaluation that the wire calls so."""
    return _RUN[1] + named.removeprefix(_RUN[0])


# --- evals ------------------------------------------------------------------------------------------------------------


def create(session: Session, wanted: CreateEval, *, project_id: str) -> EvalRow:
    """Raises Invalid for a schema or a criterion that nothing could be judged by, LimitReached."""
    run_items.schema_of(wanted.data_source_config.item_schema)
    _check_criteria(wanted.testing_criteria)
    one_at_a_time(session, f"evals:{project_id}")
    kept = session.scalar(select(func.count()).where(EvalRow.project_id == project_id, EvalRow.deleted_at.is_(None)))
    if (kept or 0) >= MAX_EVALS:
        raise LimitReached(
            f"This project already has {kept} evals, as many as it may. Delete some.", code="too_many_evals"
        )
    row = EvalRow(id=new_id("evals_"), project_id=project_id, request=wanted.model_dump(mode="json"))
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _check_criteria(criteria: Sequence[Criterion]) -> None:
    try:
        Scorer(measures(list(criteria)))
    except Invalid as error:
        param = (error.param or "").replace("measures[", "testing_criteria[").replace(".grader.grader.", ".")
        raise Invalid(error.message.replace("grader.", ""), param=param.replace(".grader.", ".")) from None
    names = [criterion.name for criterion in criteria]
    twice = next((place for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        param = f"testing_criteria[{twice}].name"
        raise Invalid(f"'{names[twice]}' stands twice in 'testing_criteria'; give each its own name.", param=param)


def find(session: Session, eval_id: str, *, project_id: str) -> EvalRow:
    """Raises NotFound."""
    row = session.get(EvalRow, eval_id)
    if row is None or row.project_id != project_id or row.deleted_at is not None:
        raise NotFound(f"No eval '{eval_id[:100]}' in this project.", param="eval_id")
    return row


def change(session: Session, eval_id: str, wanted: UpdateEval, *, project_id: str) -> EvalRow:
    """Another name or other metadata; criteria stay, or runs could not be compared. Raises NotFound."""
    row = find(session, eval_id, project_id=project_id)
    given = {name: getattr(wanted, name) for name in wanted.model_fields_set}
    row.request = CreateEval.model_validate(row.request | given).model_dump(mode="json")
    session.execute(update(EvalRow).where(EvalRow.id == row.id).values(updated_at=func.now()))
    session.flush()
    session.refresh(row)
    return row


def page(
    session: Session, *, project_id: str, after: str | None, limit: int, order: paging.Order, by_update: bool
) -> tuple[Sequence[EvalRow], bool]:
    """Evals of a project, and whether more follow. Raises NotFound for an unknown `after`."""
    moment = EvalRow.updated_at if by_update else EvalRow.created_at
    query = select(EvalRow).where(EvalRow.project_id == project_id, EvalRow.deleted_at.is_(None))
    if after is not None:
        last = session.get(EvalRow, after)
        if last is None or last.project_id != project_id:
            raise paging.never_was(after, "eval")
        key, place = func.row(moment, EvalRow.id), func.row(last.updated_at if by_update else last.created_at, last.id)
        query = query.where(key > place if order == "asc" else key < place)
    turned = [column.asc() if order == "asc" else column.desc() for column in (moment, EvalRow.id)]
    return paging.cut(session.scalars(query.order_by(*turned).limit(limit + 1)).all(), limit)


def remove(session: Session, eval_id: str, *, project_id: str) -> EvalRow:
    """Withdraw an eval with its runs and their answers; those at work end. Raises NotFound."""
    row = find(session, eval_id, project_id=project_id)
    for run in session.scalars(_runs(row)):
        evaluations.withdraw(session, run)
    session.execute(update(EvalRow).where(EvalRow.id == row.id).values(deleted_at=func.now()))
    return row


# --- runs -------------------------------------------------------------------------------------------------------------


def submit(session: Session, eval_id: str, wanted: CreateEvalRun, *, project_id: str, catalogue: Catalogue) -> SeenRun:
    """Accept a run. Raises Invalid, NotFound, NotYet, LimitReached, each naming the field."""
    row = find(session, eval_id, project_id=project_id)
    asked = CreateEval.model_validate(row.request)
    order = _order(asked, wanted)
    run_items.check_content(order)
    kept = wanted.model_dump(mode="json", include={"name", "metadata"})
    made = evaluations.submit_run(session, order, row, run=kept, catalogue=catalogue)
    return _seen(session, made, asked)


def _order(asked: CreateEval, wanted: CreateEvalRun) -> RunOrder:
    source, generation = wanted.data_source, GenerationSettings()
    if isinstance(source, CompletionsDataSource):
        run_items.check_template(source.input_messages)
        given = source.sampling_params
        generation = GenerationSettings(
            max_tokens=given.max_completion_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            seed=given.seed,
        )
    return RunOrder(
        name=wanted.name,
        subjects=[source.model if isinstance(source, CompletionsDataSource) else NO_MODEL],
        measures=[*measures(asked.testing_criteria)],
        generation=generation,
        data_source=source,
        item_schema=asked.data_source_config.item_schema,
        reads_sample="sample." in str([criterion.model_dump() for criterion in asked.testing_criteria]),
    )


def find_run(session: Session, eval_id: str, named: str, *, project_id: str) -> SeenRun:
    """Raises NotFound."""
    row = find(session, eval_id, project_id=project_id)
    run = session.scalars(_runs(row).where(_is_run(row, named))).one_or_none()
    if run is None:
        raise NotFound(f"No run '{named[:100]}' of this eval.", param="run_id")
    return _seen(session, run, CreateEval.model_validate(row.request))


def _is_run(row: EvalRow, named: str) -> ColumnElement[bool]:
    if not named.startswith(_RUN[0]):
        return false()
    return (EvaluationRow.eval_id == row.id) & (EvaluationRow.id == chore_id(named))


def run_page(
    session: Session,
    eval_id: str,
    *,
    project_id: str,
    after: str | None,
    limit: int,
    order: paging.Order,
    status: str | None,
) -> tuple[list[SeenRun], bool]:
    """Runs of an eval, and whether more follow. Raises NotFound."""
    row = find(session, eval_id, project_id=project_id)
    query = _runs(row)
    if status is not None:
        query = query.where(EvaluationRow.status.in_([ours for ours, wire in STATUSES.items() if wire == status]))
    if after is not None and session.scalar(select(EvaluationRow.id).where(_is_run(row, after))) is None:
        raise paging.never_was(after, "run")
    last = after and chore_id(after)
    rows, more = paging.page(session, query, EvaluationRow.id, after=last, limit=limit, order=order)
    asked = CreateEval.model_validate(row.request)
    return [_seen(session, run, asked) for run in rows], more


def cancel_run(session: Session, eval_id: str, named: str, *, project_id: str) -> SeenRun:
    """End a run; the answers so far stay. One that is canceled stays so. Raises NotFound, Conflict."""
    seen = find_run(session, eval_id, named, project_id=project_id)
    if not evaluations.end_early(session, seen.row) and seen.row.status != "cancelled":
        ended = STATUSES[seen.row.status]
        raise Conflict(f"The run is {ended} already; there is nothing to cancel.", param="run_id")
    return seen


def remove_run(session: Session, eval_id: str, named: str, *, project_id: str) -> SeenRun:
    """Withdraw a run with its answers; one at work ends. Raises NotFound."""
    seen = find_run(session, eval_id, named, project_id=project_id)
    evaluations.withdraw(session, seen.row)
    return seen


def answers(
    session: Session, seen: SeenRun, *, after: int | None, limit: int, order: paging.Order, passing: bool | None
) -> tuple[list[StoredAnswer], bool]:
    """Answers of a run by item, those that passed or did not, and whether more follow."""
    rows = EvaluationAnswerRow
    query = select(rows.document).where(rows.evaluation_id == seen.row.id)
    if passing is not None:
        passed = func.coalesce(_passed(seen.asked.testing_criteria), False)
        query = query.where(passed if passing else ~passed)
    if after is not None:
        query = query.where(rows.item > after if order == "asc" else rows.item < after)
    turned = rows.item.asc() if order == "asc" else rows.item.desc()
    documents, more = paging.cut(session.scalars(query.order_by(turned).limit(limit + 1)).all(), limit)
    return [StoredAnswer.model_validate(each, extra="ignore") for each in documents], more


def answer(session: Session, seen: SeenRun, item: int) -> StoredAnswer:
    """Raises NotFound."""
    rows = EvaluationAnswerRow
    document = session.scalar(select(rows.document).where(rows.evaluation_id == seen.row.id, rows.item == item))
    if document is None:
        raise NotFound(f"No output item {item} of this run, or it has no answer yet.", param="output_item_id")
    return StoredAnswer.model_validate(document, extra="ignore")


def _runs(row: EvalRow) -> Select[EvaluationRow]:
    return select(EvaluationRow).where(
        EvaluationRow.eval_id == row.id,
        EvaluationRow.project_id == row.project_id,
        EvaluationRow.deleted_at.is_(None),
    )


def _score(place: int) -> ColumnElement[Any]:
    return cast(EvaluationAnswerRow.document["scores"][measure_name(place)].astext, Float)


def _passed(criteria: Sequence[Criterion]) -> ColumnElement[bool]:
    """Whether every criterion is met; null where one has no value."""
    return and_(true(), *(_score(place) >= criterion.least for place, criterion in enumerate(criteria)))


def _seen(session: Session, row: EvaluationRow, asked: CreateEval) -> SeenRun:
    """One query over the answers so far: a run has at most 10,000."""
    document, criteria = EvaluationAnswerRow.document, asked.testing_criteria
    judged = and_(true(), *(_score(place).is_not(None) for place in range(len(criteria))))
    columns: list[ColumnElement[Any]] = [
        func.count().filter(judged, _passed(criteria)),
        func.count().filter(judged),
        func.count(),
        func.count().filter(document["tokens"].astext.is_not(None)),
        func.coalesce(func.sum(cast(document["prompt_tokens"].astext, Float)), 0),
        func.coalesce(func.sum(cast(document["tokens"].astext, Float)), 0),
    ]
    for place, criterion in enumerate(criteria):
        columns += [
            func.count().filter(_score(place) >= criterion.least),
            func.count().filter(_score(place) < criterion.least),
        ]
    figures = session.execute(select(*columns).where(EvaluationAnswerRow.evaluation_id == row.id)).one()
    passed, with_all, every, answered, prompt, completion, *by_criterion = (int(figure) for figure in figures)
    pairs = zip(by_criterion[::2], by_criterion[1::2], strict=True)
    counts = Counts(passed, with_all - passed, every - with_all, tuple(pairs), answered, prompt, completion)
    return SeenRun(row, asked, counts)
