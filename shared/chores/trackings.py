"""Verbs of trackings: a job's figures go to a tracker in order, each once. A cursor says how far they have come."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from shared.chores.deliveries import wait_seconds
from shared.chores.points import CurvePoint, Recorded, latest, whole
from shared.jobs.rows import touch
from shared.lease import journal
from shared.lease import lease as leasing
from shared.lease.journal import NewEvent
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Work
from shared.lease.values import Lease, NewFile
from shared.store.lifecycle import TERMINAL
from shared.store.tables import EventRow, FileRow, JobRow, TrackingRow
from shared.tenants import project_secrets

# From the first of failures in a row until a tracker is given up.
GIVEN_UP_AFTER: Final = timedelta(days=3)
MAX_EVENTS: Final = 5_000  # of one claim
TITLES: Final = {"wandb": "Weights & Biases", "mlflow": "MLflow", "tensorboard": "TensorBoard"}

_ENDED: Final = select(JobRow.id).where(JobRow.id == TrackingRow.job_id, JobRow.status.in_(sorted(TERMINAL))).exists()
_NEWS: Final = (
    select(EventRow.seq)
    .where(EventRow.job_id == TrackingRow.job_id, EventRow.seq > TrackingRow.cursor, EventRow.type == "metrics")
    .exists()
)
TRACKING: Final = Kind(
    name="tracking",
    row=TrackingRow,
    open=TrackingRow.state == "waiting",
    lost={
        "state": "failed",
        "finished_at": func.now(),
        "error": f"Bringing the figures there ended {MAX_FAILURES} workers.",
    },
    cancelled={"state": "failed", "finished_at": func.now(), "error": "It was cancelled."},
    # An event file is written once, of everything.
    ready=or_(_ENDED, _NEWS & (TrackingRow.tracker != "tensorboard")),
)
WORK: Final = Work(TRACKING)


@dataclass(frozen=True, slots=True)
class Tracking:
    """The right to bring a job's figures to a tracker, and all that this takes."""

    lease: Lease
    project_id: str
    job_id: str
    tracker: str
    options: Mapping[str, Any]
    place: int
    run_id: str | None
    url: str | None
    points: list[CurvePoint]
    cursor: int
    final: bool  # the job has ended, and these are the last points
    more: bool  # there are further points at once
    facts: Mapping[str, Any]
    ending: Mapping[str, Any]
    sealed: Mapping[str, str] = field(repr=False)

    @property
    def run_name(self) -> str:
        return str(self.options.get("name") or self.job_id)


@dataclass(frozen=True, slots=True)
class TrackingResult:
    """What came of a try. `error`: why nothing more could be brought there, else None."""

    run_id: str | None = None
    url: str | None = None
    file: NewFile | None = None
    error: str | None = None


def claim(
    session: Session,
    *,
    worker_id: str,
    lease_seconds: float,
    trackers: Collection[str],
    passed_over: Collection[str] = (),
) -> Tracking | None:
    """Lease the next tracking that has something to bring to one of `trackers`, or None."""
    row = leasing.take(
        session,
        TRACKING,
        worker_id=worker_id,
        lease_seconds=lease_seconds,
        passed_over=passed_over,
        where=[TrackingRow.tracker.in_(trackers)],
    )
    return None if row is None else _tracking(session, row)


def _tracking(session: Session, row: TrackingRow) -> Tracking:
    job = session.get_one(JobRow, row.job_id, populate_existing=True)
    ended = job.status in TERMINAL  # looked at before the events: then there are no more of them
    events = _events(session, row)
    more = len(events) > MAX_EVENTS
    read = events[:MAX_EVENTS]
    final = ended and not more
    if row.tracker == "tensorboard":
        points, used = latest(_events(session, row, limit=None)), None
    else:
        points, used = whole(read, final=final, after=row.last_step)
    return Tracking(
        lease=TRACKING.lease(row),
        project_id=row.project_id,
        job_id=row.job_id,
        tracker=row.tracker,
        options=row.options,
        place=row.place,
        run_id=row.run_id,
        url=row.url,
        points=points,
        cursor=row.cursor if used is None else used,
        final=final or row.tracker == "tensorboard",
        more=more,
        facts=_facts(job),
        ending=_ending(job),
        sealed=project_secrets.sealed(session, project_id=row.project_id),
    )


def _events(session: Session, row: TrackingRow, *, limit: int | None = MAX_EVENTS + 1) -> list[Recorded]:
    query = (
        select(EventRow.seq, EventRow.created_at, EventRow.data)
        .where(EventRow.job_id == row.job_id, EventRow.type == "metrics", EventRow.seq > row.cursor)
        .order_by(EventRow.seq)
        .limit(limit)
    )
    return [Recorded(*event) for event in session.execute(query)]


def _facts(job: JobRow) -> dict[str, Any]:
    """What is known of a job before it trains; names of files are their ids."""
    spec = job.spec or {}
    return {
        "job_id": job.id,
        "model": job.model,
        "base_model": job.base_model,
        "seed": job.seed,
        "suffix": job.suffix,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "metadata": job.job_metadata or {},
        **{name: spec[name] for name in ("objective", "adapter", "quantization", "training") if name in spec},
    }


def _ending(job: JobRow) -> dict[str, Any]:
    return {
        "status": job.status,
        "fine_tuned_model": job.fine_tuned_model,
        "trained_tokens": job.trained_tokens,
        "device_seconds": round(job.device_seconds, 3),
    }


def finish(session: Session, tracking: Tracking, fed: TrackingResult, *, pause_seconds: float) -> bool:
    """Note what came of a try, and when the next one is due: after `pause_seconds` while the job goes on.

    False: the lease is lost, and nothing is written.
    """
    # By whoever has the row: each of the writes below looks at the lease again.
    row = session.get_one(TrackingRow, tracking.lease.id, populate_existing=True)
    if fed.error is not None:
        return _failed(session, tracking, row, fed.error)
    if fed.file is not None:
        session.add(FileRow(project_id=tracking.project_id, status="processed", **_file_values(fed.file)))
        session.flush()
    first = fed.url is not None and row.url is None
    noted: dict[str, Any] = {
        "cursor": tracking.cursor,
        "last_step": tracking.points[-1].step if tracking.points else row.last_step,
        "run_id": fed.run_id or row.run_id,
        "url": fed.url or row.url,
        "file_id": None if fed.file is None else fed.file.id,
        "tries": 0,
        "failing_since": None,
        "error": None,
    }
    if tracking.final:
        kept = leasing.end(session, TRACKING, tracking.lease, state="done", finished_at=func.now(), **noted)
    else:
        kept = leasing.write(session, TRACKING, tracking.lease, failures=0) and leasing.postpone(
            session, TRACKING, tracking.lease, seconds=0 if tracking.more else pause_seconds, **noted
        )
    if kept and (first or tracking.final):
        _tell(session, tracking, NewEvent(f"{TITLES[tracking.tracker]} run: {fed.url}") if first else None)
    return kept


def _file_values(file: NewFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in ("id", "filename", "purpose", "bytes", "sha256", "key")}


def _failed(session: Session, tracking: Tracking, row: TrackingRow, error: str) -> bool:
    since = session.scalars(select(func.coalesce(TrackingRow.failing_since, func.now())).where(_is(row))).one()
    over = session.scalars(select(func.now() - GIVEN_UP_AFTER > since)).one()
    noted: dict[str, Any] = {"tries": row.tries + 1, "failing_since": since, "error": error}
    if not over:
        return leasing.postpone(session, TRACKING, tracking.lease, seconds=wait_seconds(row.tries), **noted)
    kept = leasing.end(session, TRACKING, tracking.lease, state="failed", finished_at=func.now(), **noted)
    if kept:
        words = (
            f"{TITLES[tracking.tracker]} was given up after three days of failures. Last: {error} The figures are in"
            " the job's events and in its result file."
        )
        _tell(session, tracking, NewEvent(words, level="warn"))
    return kept


def _is(row: TrackingRow) -> Any:
    return TrackingRow.id == row.id


def _tell(session: Session, tracking: Tracking, event: NewEvent | None) -> None:
    """A poll sees a new state of the job; `event` is put behind its others. Locks the job's row."""
    touch(session, tracking.job_id)
    if event is not None:
        journal.append(session, tracking.job_id, [event])
