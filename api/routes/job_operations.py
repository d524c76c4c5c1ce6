"""/v1/tunepool/jobs: hold, release, priority, bulk cancel. For the project's own jobs; with the scope admin for any."""

from __future__ import annotations

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import Door, DoorDep, JobsWriter
from api.pool_bodies import CancelJobs, SetPriority
from api.views import job_views, pool_views
from shared.errors import Invalid
from shared.jobs import operations
from shared.jobs.operations import Selection
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool/jobs", tags=["pool"])


@router.post("/{job_id}/hold", response_model=job_views.FineTuningJob)
def hold_job(job_id: str, caller: JobsWriter, door: DoorDep) -> job_views.FineTuningJob:
    """Keep a job from being started until it is released; one that runs goes on."""
    return _set_held(door, caller, job_id, held=True)


@router.post("/{job_id}/release", response_model=job_views.FineTuningJob)
def release_job(job_id: str, caller: JobsWriter, door: DoorDep) -> job_views.FineTuningJob:
    """Let a held job go."""
    return _set_held(door, caller, job_id, held=False)


def _set_held(door: Door, caller: Caller, job_id: str, *, held: bool) -> job_views.FineTuningJob:
    with door.session() as session:
        view = job_views.job(operations.set_held(session, caller, job_id, held=held), caller=caller)
    door.ring("training")
    return view


@router.post("/{job_id}/priority", response_model=job_views.FineTuningJob, openapi_extra=body_of(SetPriority))
def set_priority(job_id: str, caller: JobsWriter, body: RawBody, door: DoorDep) -> job_views.FineTuningJob:
    """Change a job's priority or tier, within what the key may ask for; an administrator's key has no bounds."""
    wanted = parse(body, SetPriority)
    if wanted.priority is None and wanted.tier is None:
        raise Invalid("Name a priority, a tier or both.", param="priority", code="missing_required_parameter")
    with door.session() as session:
        row = operations.set_priority(session, caller, job_id, priority=wanted.priority, tier=wanted.tier)
        view = job_views.job(row, caller=caller)
    door.ring("training")
    return view


@router.post("/cancel", response_model=pool_views.Cancelled, openapi_extra=body_of(CancelJobs))
def cancel_jobs(caller: JobsWriter, body: RawBody, door: DoorDep) -> pool_views.Cancelled:
    """Cancel many jobs at once: what waits at once, what runs (if `statuses` names it) within seconds."""
    wanted = parse(body, CancelJobs)
    filtered = bool(wanted.job_ids or wanted.group is not None or wanted.metadata)
    if wanted.all == filtered:
        raise Invalid(
            "Give a filter (job_ids, group, metadata), or all: true for every job of the project; not both.",
            param="all",
        )
    selection = Selection(
        statuses=tuple(wanted.statuses),
        job_ids=tuple(wanted.job_ids),
        group=wanted.group,
        metadata=wanted.metadata,
        project_id=wanted.project_id,
    )
    with door.session() as session:
        gone, asked = operations.cancel_all(session, caller, selection, pool_name=door.settings.pool)
    return pool_views.Cancelled(cancelled=gone, asked_to_stop=asked)
