"""The tuned model that a job goes on from: found, kept while it is waited for, and withdrawn."""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from shared.contract.parent_model import ParentModel
from shared.contract.spec import ParentFile
from shared.errors import Invalid, NotFound
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.products import adapters
from shared.store.tables import AdapterRow, JobRow

_UNFINISHED: Final = JobRow.status.in_(["validating_files", "queued", "running", "paused"])


def find(session: Session, name: str, *, project_id: str) -> ParentModel:
    """The tuned model or checkpoint with this id, name or alias that the project may use. Raises NotFound, Invalid."""
    source = adapters.find_source(session, name, project_id=project_id)
    adapter = source.adapter
    if adapter.job_id is None:
        raise Invalid(
            f"'model' is '{name[:200]}', a combination of adapters, but a job goes on from what one job has trained; "
            "name that (ft:…).",
            param="model",
            code="unsupported_combination",
        )
    return ParentModel(
        id=adapter.id,
        name=adapter.name,
        job_id=adapter.job_id,
        spec=source.spec,
        files=tuple(ParentFile(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in adapter.files),
        keys={file.name: file.key for file in adapter.files},
    )


def of_job(session: Session, job: JobRow) -> ParentModel | None:
    """The parent of a job; None: it has none, or it is withdrawn or not for this project any more."""
    if job.parent_id is None:
        return None
    try:
        return find(session, job.parent_id, project_id=job.project_id)
    except NotFound:
        return None


def hold(session: Session, parent: ParentModel) -> None:
    """Keep the parent from being withdrawn until this transaction's job is there. Raises NotFound if it already is."""
    kept = select(AdapterRow.deleted_at).where(AdapterRow.id == parent.id).with_for_update(read=True)
    row = session.execute(kept).one_or_none()  # none: a checkpoint, which nobody withdraws
    if row is not None and row.deleted_at is not None:
        raise adapters.unknown(parent.name)


def withdraw(session: Session, name: str, *, project_id: str) -> AdapterRow:
    """Withdraw an adapter. Raises NotFound, Invalid, and Conflict if an alias or an unfinished job needs it.

    Jobs of other projects, which had a permission, do not keep it; their events say so.
    """
    row = adapters.delete(session, name, project_id=project_id)
    _tell(session, JobRow.parent_id == row.id, row.name)
    return row


def _tell(session: Session, which: ColumnElement[bool], name: str) -> None:
    held = select(JobRow.id).where(which, _UNFINISHED).order_by(JobRow.id).with_for_update()
    words = f"'{name}', which this job goes on from, was deleted by its project; what has not begun to train will not."
    event = NewEvent(words, level="warn", data={"code": "parent_gone", "model": name})
    journal.append_to_each(session, list(session.scalars(held)), event)
