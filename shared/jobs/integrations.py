"""Integrations of a job: the trackers that it asks for, whether they can be fed, and rows with their progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from shared.contract.job_request import CreateJob
from shared.errors import Invalid
from shared.ids import new_id
from shared.store.tables import JobRow, TrackingRow, WorkerRow
from shared.tenants import project_secrets


@dataclass(frozen=True, slots=True)
class AskedTracker:
    """An integration as it stands in a request."""

    tracker: str
    options: dict[str, Any]
    param: str


def asked(request: CreateJob) -> list[AskedTracker]:
    """The integrations of a request, OpenAI's first."""
    named = {
        "integrations": request.integrations or (),
        "tunepool.integrations": request.tunepool.integrations or (),
    }
    trackers = []
    for param, entries in named.items():
        for index, entry in enumerate(entries):
            options = getattr(entry, entry.type, None)
            values = {} if options is None else options.model_dump(mode="json", exclude_none=True)
            trackers.append(AskedTracker(entry.type, values, f"{param}[{index}].type"))
    return trackers


def refuse_unready(session: Session, request: CreateJob, *, project_id: str) -> None:
    """Raises Invalid for an integration whose secret the project lacks, or that no worker can carry out."""
    wanted = asked(request)
    if not wanted:
        return
    abilities = session.scalars(select(WorkerRow.trackers)).all()
    for entry in wanted:
        needed = project_secrets.NEEDED.get(entry.tracker, ())
        for name in project_secrets.missing(session, needed, project_id=project_id):
            raise Invalid(
                f"'{entry.param}' is {entry.tracker}, but this project has no secret {name}. Store it with"
                f" `tunepool secrets set {name}` (PUT /v1/tunepool/secrets/{name}), or leave the integration out.",
                param=entry.param,
                code="secret_missing",
            )
        # A service whose workers have not come up yet says nothing: the row waits until they have.
        if abilities and not any(entry.tracker in (trackers or ()) for trackers in abilities):
            raise Invalid(
                f"'{entry.param}' is {entry.tracker}, but no worker has the library for it. An administrator installs"
                " it on a worker with `pip install 'tunepool-server[trackers]'`; else leave the integration out.",
                param=entry.param,
                code="tracker_unavailable",
            )


def record(session: Session, request: CreateJob, job: JobRow) -> None:
    """Have the job's figures brought to the trackers that it asks for."""
    rows = [
        {
            "id": new_id("tracking_"),
            "project_id": job.project_id,
            "job_id": job.id,
            "place": place,
            "tracker": entry.tracker,
            "options": entry.options,
        }
        for place, entry in enumerate(asked(request))
    ]
    if rows:
        session.execute(insert(TrackingRow), rows)


def listed(session: Session, job: JobRow) -> Sequence[TrackingRow]:
    """What became of a job's integrations, in the order of its request. Most jobs have none, which costs nothing."""
    request = job.request
    if not request.get("integrations") and not (request.get("tunepool") or {}).get("integrations"):
        return ()
    return session.scalars(select(TrackingRow).where(TrackingRow.job_id == job.id).order_by(TrackingRow.place)).all()
