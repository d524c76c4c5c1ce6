"""/v1/tunepool/schedules: jobs that start by the clock or when data changes, and the outcome of each start."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.request_span import of_request
from api.schedule_bodies import RunSchedule
from api.views import schedule_views, view
from shared.chores import schedule_runs, schedules
from shared.contract.schedule import CreateSchedule
from shared.errors import Conflict, TunepoolError
from shared.tenants import audit

router = APIRouter(prefix="/v1/tunepool/schedules", tags=["schedules"])

LAST_RUNS = 10
# What the submission of a job calls wrong; of a schedule's own fields the routes say the name.
OWN_FIELDS = frozenset({"name", "cron", "time_zone", "data_prefix", "schedule"})


@router.post("", response_model=schedule_views.JobSchedule, openapi_extra=body_of(CreateSchedule))
def create_schedule(caller: JobsWriter, body: RawBody, door: DoorDep) -> schedule_views.JobSchedule:
    """Have a job start by the clock, or when data changes. The job is checked now by what accepts jobs."""
    wanted = parse(body, CreateSchedule)
    try:
        base, parent = door.start(wanted.job.model, project_id=caller.project_id)
        with door.session() as session:
            row = schedules.create(session, wanted, caller, base=base, parent=parent)
            return schedule_views.schedule(row, [])
    except TunepoolError as error:
        if error.param is not None and error.param not in OWN_FIELDS and not error.param.startswith("job."):
            error.param = f"job.{error.param}"
        raise


@router.get("", response_model=schedule_views.SchedulePage)
def list_schedules(
    caller: JobsReader,
    door: DoorDep,
    after: After = None,
    limit: Limit = 20,
) -> schedule_views.SchedulePage:
    """The project's schedules by name, each with its last run. `after`: the last name of the page before."""
    with door.session() as session:
        rows, more = schedules.page(session, project_id=caller.project_id, after=after, limit=limit)
        data = [schedule_views.schedule(row, schedules.runs(session, row, limit=1)[0]) for row in rows]
    return schedule_views.SchedulePage(data=data, has_more=more)


@router.get("/{schedule}", response_model=schedule_views.JobSchedule)
def retrieve_schedule(schedule: str, caller: JobsReader, door: DoorDep) -> schedule_views.JobSchedule:
    """A schedule, by id or name: when it is due next, and the verdicts of its last runs."""
    with door.session() as session:
        row = schedules.find(session, schedule, project_id=caller.project_id)
        return schedule_views.schedule(row, schedules.runs(session, row, limit=LAST_RUNS)[0])


@router.get("/{schedule}/runs", response_model=schedule_views.ScheduleRunPage)
def list_runs(
    schedule: str,
    caller: JobsReader,
    door: DoorDep,
    after: After = None,
    limit: Limit = 20,
) -> schedule_views.ScheduleRunPage:
    """Every run, newest first. Those that started nothing are kept for 90 days."""
    with door.session() as session:
        row = schedules.find(session, schedule, project_id=caller.project_id)
        runs, more = schedules.runs(session, row, after=after, limit=limit)
        data = [schedule_views.run(past, status) for past, status in runs]
    return schedule_views.ScheduleRunPage(data=data, has_more=more)


@router.post("/{schedule}/run", response_model=schedule_views.ScheduleRun, openapi_extra=body_of(RunSchedule))
def run_schedule(
    schedule: str, asked: Request, caller: JobsWriter, body: RawBody, door: DoorDep
) -> schedule_views.ScheduleRun:
    """Run it now, also while it is paused. The answer is the run with its verdict; a refusal is one, too."""
    force = parse(body, RunSchedule).force
    with door.session() as session:
        row = schedules.find(session, schedule, project_id=caller.project_id)
    act = schedule_runs.prepared(
        door.session, door.settings, row.id, by_hand=True, force=force, traceparent=of_request(asked)
    )
    with door.session() as session:
        run = act(session)
        if run is None:
            raise Conflict(f"The schedule '{row.name}' has just been deleted.", param="schedule")
        audit.record(session, caller, "schedule.run", row.id, after={"run": run.id, "verdict": run.verdict})
        answer = schedule_views.run(run, "validating_files" if run.job_id else None)
    door.ring("cpu")
    return answer


@router.post("/{schedule}/pause", response_model=schedule_views.JobSchedule)
def pause_schedule(schedule: str, caller: JobsWriter, door: DoorDep) -> schedule_views.JobSchedule:
    """Start nothing more. Jobs that it has started go on."""
    with door.session() as session:
        row = schedules.pause(session, schedule, caller)
        return schedule_views.schedule(row, schedules.runs(session, row, limit=LAST_RUNS)[0])


@router.post("/{schedule}/resume", response_model=schedule_views.JobSchedule)
def resume_schedule(schedule: str, caller: JobsWriter, door: DoorDep) -> schedule_views.JobSchedule:
    """Go on from now. What was due while it was paused is not made up for."""
    with door.session() as session:
        row = schedules.resume(session, schedule, caller)
        return schedule_views.schedule(row, schedules.runs(session, row, limit=LAST_RUNS)[0])


@router.delete("/{schedule}", response_model=view.Deleted)
def delete_schedule(schedule: str, caller: JobsWriter, door: DoorDep) -> view.Deleted:
    """Remove a schedule. The jobs that it has started stay."""
    with door.session() as session:
        row = schedules.delete(session, schedule, caller)
    return view.Deleted(id=row.id, object="tunepool.schedule")
