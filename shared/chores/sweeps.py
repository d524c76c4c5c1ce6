"""Verbs of sweeps: asked for, listed, shown, paused and cancelled. shared/chores/sweep_rounds.py moves them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contract.job_request import CreateJob
from shared.contract.parent_model import ParentModel
from shared.contract.spec import BaseModelRef
from shared.contract.sweep import CreateSweep
from shared.errors import Conflict, Invalid, NotFound
from shared.jobs import moves, submission
from shared.settle import refusals
from shared.store import paging
from shared.store.lifecycle import is_terminal
from shared.store.locks import one_at_a_time
from shared.store.tables import AttemptRow, JobRow, SweepRow, TrialRow
from shared.tenants.keys import Caller

UNFINISHED: Final = ("running", "paused")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NewTrial:
    """A trial that may be stored: its values by field, and the request that a submit would accept."""

    settings: dict[str, Any]
    request: CreateJob


@dataclass(frozen=True, slots=True)
class SeenSweep:
    """A sweep with its trials, in order, and their jobs by id; `seconds`: device-seconds of each job so far."""

    row: SweepRow
    trials: Sequence[TrialRow]
    jobs: Mapping[str, JobRow]
    seconds: Mapping[str, float]


def create(
    session: Session,
    sweep_id: str,
    wanted: CreateSweep,
    trials: Sequence[NewTrial],
    *,
    caller: Caller,
    base: BaseModelRef,
    parent: ParentModel | None,
    request_sha256: str,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> SweepRow:
    """Accept a sweep whole, or return the one that this Idempotency-Key has already made. Nothing trains yet.

    `traceparent`: of the request's span, which the jobs of its trials remember.

    Raises Invalid, NotFound, Forbidden, and Conflict for a key that made another one.
    """
    if idempotency_key is not None:
        one_at_a_time(session, f"sweep:{caller.key_id}:{idempotency_key}")
        earlier = _earlier(session, caller, idempotency_key, request_sha256)
        if earlier is not None:
            return earlier
    for number, trial in enumerate(trials):
        with_words_of(number, trial.settings, partial(refusals.check_request, trial.request, base, parent))
    submission.refuse_unfit(session, trials[0].request, caller=caller, base=base, parent=parent)
    row = SweepRow(
        id=sweep_id,
        project_id=caller.project_id,
        key_id=caller.key_id,
        idempotency_key=idempotency_key,
        request_sha256=request_sha256,
        request=wanted.model_dump(mode="json", exclude_unset=True),
        base=base.model_dump(mode="json"),
        parent_name=None if parent is None else parent.name,
        traceparent=traceparent,
    )
    session.add(row)
    session.flush()
    for number, trial in enumerate(trials):
        request = trial.request.model_dump(mode="json", exclude_unset=True)
        session.add(TrialRow(sweep_id=row.id, number=number, settings=trial.settings, request=request))
    session.flush()
    session.refresh(row)
    return row


def with_words_of(number: int, settings: Mapping[str, Any], check: Callable[[], T]) -> T:
    """What `check` returns; its refusals name the trial. Raises Invalid."""
    try:
        return check()
    except Invalid as error:
        chosen = ", ".join(f"{name} = {str(value)[:80]}" for name, value in settings.items())
        raise Invalid(f"Trial {number} ({chosen}): {error.message}", param=error.param, code=error.code) from None


def _earlier(session: Session, caller: Caller, idempotency_key: str, request_sha256: str) -> SweepRow | None:
    row = session.scalars(
        select(SweepRow).where(SweepRow.key_id == caller.key_id, SweepRow.idempotency_key == idempotency_key)
    ).one_or_none()
    if row is not None and row.request_sha256 != request_sha256:
        raise Conflict(
            "This Idempotency-Key was already used with another request body. Use a new key for a new request.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return row


def find(session: Session, sweep_id: str, *, project_id: str) -> SweepRow:
    """Raises NotFound."""
    row = session.scalars(
        select(SweepRow).where(SweepRow.id == sweep_id, SweepRow.project_id == project_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"No sweep '{sweep_id[:100]}' in this project.", param="sweep_id")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[SweepRow], bool]:
    """Sweeps of a project, newest first, and whether more follow. Raises NotFound for an unknown `after`."""
    mine = SweepRow.project_id == project_id
    return paging.page(session, select(SweepRow), SweepRow.id, mine, after=after, limit=limit, what="sweep")


def counts(session: Session, sweep_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of each sweep: state -> how many of its trials."""
    counted: dict[str, dict[str, int]] = {sweep_id: {} for sweep_id in sweep_ids}
    for sweep_id, state, count in session.execute(
        select(TrialRow.sweep_id, TrialRow.state, func.count())
        .where(TrialRow.sweep_id.in_(sweep_ids))
        .group_by(TrialRow.sweep_id, TrialRow.state)
    ):
        counted[sweep_id][state] = count
    return counted


def seen(session: Session, row: SweepRow) -> SeenSweep:
    """A sweep with all that surrounds it."""
    trials = session.scalars(select(TrialRow).where(TrialRow.sweep_id == row.id).order_by(TrialRow.number)).all()
    known = [trial.job_id for trial in trials if trial.job_id is not None]
    jobs = {job.id: job for job in session.scalars(select(JobRow).where(JobRow.id.in_(known)))}
    return SeenSweep(row, trials, jobs, device_seconds(session, jobs))


def device_seconds(session: Session, jobs: Mapping[str, JobRow]) -> dict[str, float]:
    """What each job has used so far, the attempt at work included."""
    used = {job.id: job.device_seconds for job in jobs.values()}
    devices = func.jsonb_array_length(AttemptRow.device_ids)
    at_work = select(AttemptRow.job_id, func.extract("epoch", func.now() - AttemptRow.started_at) * devices).where(
        AttemptRow.job_id.in_(list(jobs)), AttemptRow.ended_at.is_(None), AttemptRow.phase != "submitted"
    )
    for job_id, seconds in session.execute(at_work):
        used[job_id] += max(0.0, float(seconds))
    return used


def cancel(session: Session, sweep_id: str, *, project_id: str) -> SweepRow:
    """End a sweep: what waits is cancelled, what runs is asked to stop. Twice is fine; an ended one is Invalid."""
    row = find(session, sweep_id, project_id=project_id)
    if not _moved(session, row, UNFINISHED, "cancelled", finished_at=func.now()):
        if row.status != "cancelled":
            raise Invalid(f"Sweep {row.id} has already {row.status}; it cannot be cancelled.", code="sweep_over")
        return row
    around = seen(session, row)
    reason = f"Cancelled with sweep {row.id}"
    moves.cancel_all_waiting(session, list(around.jobs), reason=reason)
    moves.request_cancel_of_running(session, list(around.jobs), reason=reason)
    for trial in around.trials:
        if trial.state == "planned":
            trial.state = "cancelled"
        elif trial.state == "started":
            job = around.jobs[trial.job_id or ""]
            session.refresh(job)
            trial.state = job.status if is_terminal(job.status) else "cancelled"  # type: ignore[arg-type]  # text
    session.flush()
    return row


def set_paused(session: Session, sweep_id: str, *, paused: bool, project_id: str) -> SweepRow:
    """Start and compare nothing more, or go on. What runs goes on. Raises NotFound, Invalid for an ended sweep."""
    row = find(session, sweep_id, project_id=project_id)
    before, after = ("running", "paused") if paused else ("paused", "running")
    if not _moved(session, row, (before,), after) and row.status != after:
        wish = "paused" if paused else "resumed"
        raise Invalid(f"Sweep {row.id} has already {row.status}; it cannot be {wish}.", code="sweep_over")
    return row


def _moved(session: Session, row: SweepRow, before: Sequence[str], after: str, **values: Any) -> bool:
    """Whether this act moved the sweep. The row is as it stands now, either way."""
    moved = session.execute(
        update(SweepRow)
        .where(SweepRow.id == row.id, SweepRow.status.in_(before))
        .values(status=after, **values)
        .returning(SweepRow.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    session.refresh(row)
    return moved is not None
