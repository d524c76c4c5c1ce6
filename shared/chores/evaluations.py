"""Verbs of evaluations: subjects measured on the same items, on the CPU lane, under a lease (shared/lease).

Answers are kept as they come. An evaluation that another worker goes on with asks only what nobody has answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Unpack

from pydantic import ValidationError
from sqlalchemy import delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.chores import failing
from shared.contract.documents import error_document
from shared.contract.evals import CompletionsDataSource, FileById, RunOrder
from shared.contract.evaluation import CreateEvaluation, EvaluationOrder, EvaluationReport, ItemsOfFile, ItemsOfSplit
from shared.contract.evaluation_run import StoredAnswer
from shared.contract.generation import Target
from shared.errors import Conflict, Invalid, LimitReached, NotFound, TunepoolError
from shared.fleet import playgrounds
from shared.ids import new_id
from shared.lease import lease as leasing
from shared.lease import turns
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Claiming, Work
from shared.lease.values import FileRef, Lease, WrittenByNewerVersion
from shared.products import adapters, files
from shared.rows.measuring import Scorer
from shared.settle.catalogue import Catalogue
from shared.store import paging
from shared.store.locks import one_at_a_time
from shared.store.tables import EvalRow, EvaluationAnswerRow, EvaluationRow, FileRow, JobRow

MAX_UNFINISHED: Final = 50  # of one project
RETRY_AFTER: Final = timedelta(seconds=30)

_UNCHECKED = (
    select(FileRow.id)
    .where(FileRow.id == EvaluationRow.file_id, FileRow.status == "uploaded", FileRow.packed.is_(True))
    .exists()
)
EVALUATION: Final = Kind(
    name="evaluation",
    row=EvaluationRow,
    open=EvaluationRow.status.in_(["queued", "running"]) & EvaluationRow.deleted_at.is_(None),
    ready=~_UNCHECKED,
    taken={"status": "running"},
    waiting={"status": "queued"},
    lost={
        "status": "failed",
        "error": error_document(
            "worker_lost",
            f"This evaluation ended {MAX_FAILURES} workers, as a rule by taking more memory than there is.",
        ),
        "finished_at": func.now(),
    },
    cancelled={"status": "cancelled", "error": None, "finished_at": func.now()},
)
WORK: Final = Work(EVALUATION, long=True)
AnswerKey = tuple[str, int, int]  # part, item, place of the subject


@dataclass(frozen=True, slots=True)
class EvaluationClaim:
    """The right to go on with an evaluation; `lease.id` is its id."""

    lease: Lease
    project_id: str
    request: CreateEvaluation | RunOrder
    targets: tuple[Target, ...]  # in the order of the request's subjects
    file: FileRef | None


@dataclass(frozen=True, slots=True)
class SeenEvaluation:
    """`ahead`: unfinished ones, of whatever project, that are older; `checking`: its file is not read yet."""

    row: EvaluationRow
    ahead: int = 0
    checking: bool = False


# --- what users ask ---------------------------------------------------------------------------------------------------


def submit(session: Session, request: CreateEvaluation, *, project_id: str, catalogue: Catalogue) -> EvaluationRow:
    """Accept an evaluation. Raises Invalid, NotFound, NotYet, LimitReached, each naming the field."""
    one_at_a_time(session, f"evaluations:{project_id}")
    Scorer(request.measures)
    targets = [
        _target(session, name, f"subjects[{place}]", project_id=project_id, catalogue=catalogue)
        for place, name in enumerate(request.subjects)
    ]
    file = _file(session, request, project_id=project_id)
    return _added(session, request, project_id=project_id, targets=targets, file=file)


def submit_run(
    session: Session, order: RunOrder, row: EvalRow, *, run: dict[str, Any], catalogue: Catalogue
) -> EvaluationRow:
    """Accept a run of an eval. Raises Invalid, NotFound, LimitReached, each naming the field."""
    project_id = row.project_id
    one_at_a_time(session, f"evaluations:{project_id}")
    source, asked = order.data_source.source, order.data_source
    targets, file = [], None
    if isinstance(asked, CompletionsDataSource):
        targets = [_target(session, asked.model, "data_source.model", project_id=project_id, catalogue=catalogue)]
    if isinstance(source, FileById):
        file = _readable(_found_file(session, source.id, "data_source.source.id", project_id=project_id))
    return _added(session, order, project_id=project_id, targets=targets, file=file, eval_id=row.id, run=run)


def _added(
    session: Session,
    request: EvaluationOrder,
    *,
    project_id: str,
    targets: Sequence[Target],
    file: FileRow | None,
    **columns: Any,
) -> EvaluationRow:
    waiting = session.scalar(select(func.count()).where(EvaluationRow.project_id == project_id, EVALUATION.open))
    if (waiting or 0) >= MAX_UNFINISHED:
        raise LimitReached(
            f"This project already has {waiting} unfinished evaluations, as many as it may. Wait for some to end, or "
            "cancel some.",
            code="too_many_evaluations",
        )
    row = EvaluationRow(
        id=new_id("eval_"),
        project_id=project_id,
        status="queued",
        request=request.model_dump(mode="json"),
        targets=[target.model_dump(mode="json") for target in targets],
        file_id=None if file is None else file.id,
        **columns,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _target(session: Session, name: str, param: str, *, project_id: str, catalogue: Catalogue) -> Target:
    try:
        return playgrounds.target(session, name, project_id=project_id, catalogue=catalogue)
    except TunepoolError as error:
        raise type(error)(error.message, param=param, code=error.code) from None


def _file(session: Session, request: CreateEvaluation, *, project_id: str) -> FileRow | None:
    """The file that holds the items; None: a suite of ours."""
    wanted = request.items
    if isinstance(wanted, ItemsOfFile):
        row = _found_file(session, wanted.file_id, "items.file_id", project_id=project_id)
    elif isinstance(wanted, ItemsOfSplit):
        job = session.get(JobRow, wanted.job)
        if job is None or job.project_id != project_id:
            raise NotFound(f"No job '{wanted.job[:100]}' in this project.", param="items.job")
        row = _found_file(session, job.training_file, "items.job", project_id=project_id)
    else:
        return None
    return _readable(row)


def _readable(row: FileRow) -> FileRow:
    """Raises Invalid for a file that no rows were made of."""
    if row.packed and row.rows_key is None and row.status != "uploaded":
        raise Invalid(
            f"File '{row.id}' is no JSONL, and no rows were made of it. Upload it with the purpose fine-tune, or as "
            "JSONL.",
            param="items",
            code="file_not_readable",
        )
    return row


def _found_file(session: Session, file_id: str, param: str, *, project_id: str) -> FileRow:
    try:
        return files.find(session, file_id, project_id=project_id)
    except NotFound as error:
        raise NotFound(error.message, param=param) from None


def find(session: Session, evaluation_id: str, *, project_id: str) -> EvaluationRow:
    """Raises NotFound."""
    row = session.scalars(
        select(EvaluationRow).where(
            EvaluationRow.id == evaluation_id,
            EvaluationRow.project_id == project_id,
            EvaluationRow.eval_id.is_(None),
            EvaluationRow.deleted_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"No evaluation '{evaluation_id[:100]}' in this project.", param="evaluation_id")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[EvaluationRow], bool]:
    """Evaluations of a project, newest first, and whether more follow."""
    query = select(EvaluationRow).where(EvaluationRow.deleted_at.is_(None))
    mine = (EvaluationRow.project_id == project_id) & EvaluationRow.eval_id.is_(None)
    return paging.page(session, query, EvaluationRow.id, mine, after=after, limit=limit, what="evaluation")


def seen(session: Session, row: EvaluationRow) -> SeenEvaluation:
    """An evaluation with what holds it up, if it waits."""
    if row.status != "queued":
        return SeenEvaluation(row)
    ahead = session.scalar(select(func.count()).where(EVALUATION.open, EvaluationRow.id < row.id))
    checking = session.scalar(select(func.count()).where(EvaluationRow.id == row.id, _UNCHECKED))
    return SeenEvaluation(row, ahead=ahead or 0, checking=bool(checking))


def cancel(session: Session, evaluation_id: str, *, project_id: str) -> EvaluationRow:
    """End an evaluation; the answers so far stay. One that is cancelled stays so. Raises NotFound, Conflict."""
    row = find(session, evaluation_id, project_id=project_id)
    if not end_early(session, row) and row.status != "cancelled":
        raise Conflict(f"The evaluation has {row.status} already; there is nothing to cancel.", param="evaluation_id")
    return row


def end_early(session: Session, row: EvaluationRow) -> bool:
    """queued, running -> cancelled. False: it had ended before."""
    ended = leasing.cancel(session, EVALUATION, row.id)
    session.refresh(row)
    return ended is not None


def remove(session: Session, evaluation_id: str, *, project_id: str) -> EvaluationRow:
    """Withdraw an evaluation with all its answers; one at work ends. Raises NotFound."""
    row = find(session, evaluation_id, project_id=project_id)
    withdraw(session, row)
    return row


def withdraw(session: Session, row: EvaluationRow) -> None:
    """End it, if it is at work, and forget all its answers."""
    session.execute(update(EvaluationRow).where(EvaluationRow.id == row.id).values(deleted_at=func.now()))
    session.execute(delete(EvaluationAnswerRow).where(EvaluationAnswerRow.evaluation_id == row.id))


def answers_page(
    session: Session, evaluation_id: str, *, subject: int | None, after: AnswerKey | None, limit: int
) -> tuple[list[StoredAnswer], bool]:
    """Answers in the order of items, the forgetting set before them, and whether more follow."""
    rows = EvaluationAnswerRow
    query = select(rows.document).where(rows.evaluation_id == evaluation_id)
    if subject is not None:
        query = query.where(rows.subject == subject)
    if after is not None:
        query = query.where(tuple_(rows.part, rows.item, rows.subject) > tuple_(*after))
    ordered = query.order_by(rows.part, rows.item, rows.subject).limit(limit + 1)
    documents, more = paging.cut(session.scalars(ordered).all(), limit)
    return [StoredAnswer.model_validate(document, extra="ignore") for document in documents], more


# --- what the holder of a lease reads and writes ----------------------------------------------------------------------


def claim(session: Session, **claiming: Unpack[Claiming]) -> EvaluationClaim | None:
    """Lease the next evaluation that nobody works on, or None: a worker has one at a time.

    Raises WrittenByNewerVersion.
    """
    row = turns.take_alone(session, WORK, **claiming)
    return None if row is None else _claim(session, row)


def _claim(session: Session, row: EvaluationRow) -> EvaluationClaim:
    try:
        request = (CreateEvaluation if row.eval_id is None else RunOrder).model_validate(row.request)
        targets = tuple(Target.model_validate(target) for target in row.targets)
    except ValidationError as error:
        raise WrittenByNewerVersion(row.id) from error
    file = None if row.file_id is None else session.get_one(FileRow, row.file_id)
    return EvaluationClaim(
        lease=EVALUATION.lease(row),
        project_id=row.project_id,
        request=request,
        targets=targets,
        file=None if file is None else FileRef.of(file),
    )


def must_be_there(session: Session, claim: EvaluationClaim) -> None:
    """Raises NotFound when a subject or the file of items has been deleted meanwhile."""
    for place, target in enumerate(claim.targets):
        if target.adapter is not None:
            try:
                adapters.find_published(session, target.adapter, project_id=claim.project_id)
            except NotFound:
                raise NotFound(
                    f"'{claim.request.subjects[place]}' has been deleted meanwhile.",
                    param=f"subjects[{place}]",
                    code="model_not_found",
                ) from None
    if claim.file is not None:
        files.find(session, claim.file.id, project_id=claim.project_id)


def answered(session: Session, evaluation_id: str) -> set[AnswerKey]:
    """What needs not be asked again."""
    rows = EvaluationAnswerRow
    keys = session.execute(select(rows.part, rows.item, rows.subject).where(rows.evaluation_id == evaluation_id))
    return {(part, item, subject) for part, item, subject in keys}


def answers(session: Session, evaluation_id: str) -> list[StoredAnswer]:
    """All answers, in the order of items."""
    rows = EvaluationAnswerRow
    documents = session.scalars(
        select(rows.document).where(rows.evaluation_id == evaluation_id).order_by(rows.part, rows.item, rows.subject)
    )
    return [StoredAnswer.model_validate(document, extra="ignore") for document in documents]


def begin(session: Session, lease: Lease, *, items: int, device: str) -> bool:
    """The items are read. False: fenced off, cancelled or deleted."""
    return leasing.write(session, EVALUATION, lease, items=items, device=device, error=None)


def keep(session: Session, lease: Lease, kept: Iterable[StoredAnswer]) -> bool:
    """Store answers; one that is there already stays as it is. False: the lease is lost, and nothing is written."""
    if not leasing.write(session, EVALUATION, lease, error=None):  # it locks the row until the commit
        return False
    values = [
        {
            "evaluation_id": lease.id,
            "part": answer.part,
            "item": answer.item,
            "subject": answer.subject,
            "document": answer.model_dump(mode="json"),
        }
        for answer in kept
    ]
    if not values:
        return True
    added = session.execute(
        insert(EvaluationAnswerRow).values(values).on_conflict_do_nothing().returning(EvaluationAnswerRow.item)
    ).all()
    return leasing.write(session, EVALUATION, lease, answered=EvaluationRow.answered + len(added))


def finish(session: Session, lease: Lease, report: EvaluationReport) -> bool:
    """running -> succeeded. False: fenced off, cancelled or deleted."""
    document = report.model_dump(mode="json")
    return leasing.end(
        session, EVALUATION, lease, status="succeeded", report=document, error=None, finished_at=func.now()
    )


def fail(session: Session, lease: Lease, *, code: str, message: str, param: str | None = None) -> bool:
    """running -> failed: trying again would not help. The answers so far stay."""
    return failing.fail(session, EVALUATION, lease, code=code, message=message, param=param)


def give_back(session: Session, lease: Lease, *, code: str, message: str) -> bool:
    """running -> queued after something that may pass; failed with it after the last try."""
    seconds = RETRY_AFTER.total_seconds()
    return failing.give_back(session, EVALUATION, lease, seconds=seconds, code=code, message=message)


def postpone(session: Session, lease: Lease, *, code: str, message: str, seconds: float | None = None) -> bool:
    """running -> queued for a while: others have the device or its memory now. It counts as no try."""
    wait = RETRY_AFTER.total_seconds() if seconds is None else seconds
    return leasing.postpone(session, EVALUATION, lease, seconds=wait, error=error_document(code, message))
