"""/ui/schedules: jobs that start by the clock or when data changes, and the outcome of each start."""

from __future__ import annotations

import json
from typing import Any, Final, get_args

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.paging import After
from api.routes import schedules as schedule_routes
from api.ui import rendering, visits
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm
from shared.contract.schedule import Overlap

router = APIRouter(prefix="/ui/schedules", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50
RUNS: Final = 20
OVERLAPS: Final = get_args(Overlap)


@router.get("")
def schedules_page(request: Request, door: DoorDep, visit: JobsVisitor, after: After = None) -> Response:
    listed = schedule_routes.list_schedules(visit.caller, door, after=after, limit=ROWS)
    return rendering.page(
        request, visit, "schedules.html", schedules=listed.data, more=listed.has_more, after=after, overlaps=OVERLAPS
    )


@router.post("")
def create_schedule(door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """The usual fields of a job; the command line takes all of them."""
    job = {"model": form.must("model"), "training_file": form.get("training_file")}
    body: dict[str, Any] = {
        "name": form.must("name"),
        "cron": form.get("cron"),
        "time_zone": form.get("time_zone") or "UTC",
        "data_prefix": form.get("data_prefix"),
        "overlap": form.get("overlap") or OVERLAPS[0],
        "job": {name: value for name, value in job.items() if value},
    }
    made = schedule_routes.create_schedule(visit.caller, json.dumps(body).encode(), door)
    return visits.back(visits.address("/ui/schedules", made.name))


@router.get("/{schedule}")
def schedule_page(schedule: str, request: Request, door: DoorDep, visit: JobsVisitor, after: After = None) -> Response:
    shown = schedule_routes.retrieve_schedule(schedule, visit.caller, door)
    runs = schedule_routes.list_runs(schedule, visit.caller, door, after=after, limit=RUNS)
    return rendering.page(
        request, visit, "schedule.html", schedule=shown, runs=runs.data, more=runs.has_more, after=after
    )


@router.post("/{schedule}/run")
def run_schedule(schedule: str, request: Request, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    body = {"force": form.get("force") == "yes"}
    schedule_routes.run_schedule(schedule, request, visit.caller, json.dumps(body).encode(), door)
    return visits.back(visits.address("/ui/schedules", schedule))


@router.post("/{schedule}/pause")
def pause_schedule(schedule: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    schedule_routes.pause_schedule(schedule, visit.caller, door)
    return visits.back(visits.address("/ui/schedules", schedule))


@router.post("/{schedule}/resume")
def resume_schedule(schedule: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    schedule_routes.resume_schedule(schedule, visit.caller, door)
    return visits.back(visits.address("/ui/schedules", schedule))


@router.post("/{schedule}/delete")
def delete_schedule(schedule: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    schedule_routes.delete_schedule(schedule, visit.caller, door)
    return visits.back("/ui/schedules")
