"""The whole pool at one moment, for people: devices, workers, shares, the queue in its order. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.fleet import members, snapshot
from shared.fleet.members import Seat
from shared.jobs import pages
from shared.operating import administration
from shared.plan.preemption import RunningJob
from shared.plan.scheduling import Policy, QueuedJob, Share
from shared.plan.verdicts import Verdict
from shared.store.tables import AttemptRow, DeviceRow, JobRow, ProjectRow, WorkerRow
from shared.tenants import projects, usage

QUEUE_SHOWN: Final = 100
PREEMPTIONS_SHOWN: Final = 20
PREEMPTIONS_SINCE: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job in its place. No verdict: the next pull starts it."""

    job: QueuedJob
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class ProjectStanding:
    """A project in the pool: what it holds, what waits, what it has used."""

    project: ProjectRow
    share: Share
    running_devices: int
    queued: int
    month_seconds: float
    reserved_seconds: float  # of them: charged for what runs, and not held yet


@dataclass(frozen=True, slots=True)
class PastPreemption:
    """An attempt that gave its devices away: to another job (`preempted`), or because its worker shut down."""

    job_id: str
    project_id: str
    attempt: int
    outcome: str
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Overview:
    name: str
    now: datetime
    policy: Policy
    workers: Sequence[WorkerRow]
    devices: Sequence[DeviceRow]
    running: Mapping[str, RunningJob]
    seats: Sequence[Seat]
    standings: Sequence[ProjectStanding]
    queue: Sequence[Waiting]
    counts: Mapping[str, int]
    preemptions: Sequence[PastPreemption]


def overview(session: Session, *, pool_name: str) -> Overview:
    """The whole pool. The door decides which part each caller may see."""
    view = snapshot.snapshot(session, pool_name=pool_name)
    made = snapshot.make_plan(view)
    queued = {job.id: job for job in view.queue}
    starting = [Waiting(queued[assignment.job_id], None) for assignment in made.assignments]
    blocked = (Waiting(queued[job_id], made.verdicts[job_id]) for job_id in made.verdicts)
    return Overview(
        name=pool_name,
        now=view.now,
        policy=view.policy,
        workers=[worker for worker in administration.all_workers(session) if worker.pool == pool_name],
        devices=pages.devices(session, pool_name=pool_name),
        running={job_id: job for job in view.running for job_id in (job.id, *job.companions)},
        seats=members.seats(session, pool_name=pool_name),
        standings=_standings(session, view),
        queue=[*starting, *islice(blocked, max(0, QUEUE_SHOWN - len(starting)))],
        counts=pages.unfinished(session),
        preemptions=_preemptions(session),
    )


def _preemptions(session: Session) -> list[PastPreemption]:
    """Of the last day, the newest first."""
    query = (
        select(JobRow.id, JobRow.project_id, AttemptRow.number, AttemptRow.outcome, AttemptRow.ended_at)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.ended_at > func.now() - PREEMPTIONS_SINCE, AttemptRow.outcome.in_(("preempted", "drained")))
        .order_by(AttemptRow.ended_at.desc())
        .limit(PREEMPTIONS_SHOWN)
    )
    return [
        PastPreemption(job_id, project_id, number, outcome, ended_at)
        for job_id, project_id, number, outcome, ended_at in session.execute(query)
        if outcome is not None and ended_at is not None
    ]


def _standings(session: Session, view: snapshot.Snapshot) -> list[ProjectStanding]:
    rows = projects.listed(session)
    ids = [row.id for row in rows]
    months, ahead = usage.this_month(session, ids), usage.reserved(session, ids)
    waiting, held = Counter(job.project for job in view.queue), Counter[str]()
    for job in view.running:
        held[job.project] += len(job.device_ids)
    shares = {share.project: share for share in view.shares}
    return [
        ProjectStanding(
            row, shares[row.id], held[row.id], waiting[row.id], months.get(row.id, 0.0), ahead.get(row.id, 0.0)
        )
        for row in rows
        if row.id in shares
    ]


def standing(session: Session, project_id: str, *, pool_name: str) -> ProjectStanding:
    """One project's. Raises NotFound."""
    projects.find(session, project_id)
    view = snapshot.snapshot(session, pool_name=pool_name)
    return next(
        project_standing for project_standing in _standings(session, view) if project_standing.project.id == project_id
    )
