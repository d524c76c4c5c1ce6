"""/ui/jobs/ID: one job, from why it waits to what came of it, and the orders that may be given about it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, get_args

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from api.deps import Door, DoorDep
from api.paging import After
from api.routes import exports as export_routes
from api.routes import job_logs as log_routes
from api.routes import job_operations as operation_routes
from api.routes import jobs as job_routes
from api.routes import merges as merge_routes
from api.ui import curves, rendering, visits, wording
from api.ui.curves import Axis
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm
from api.views.export_views import Export
from api.views.history_views import Checkpoint, Event
from api.views.job_views import FineTuningJob
from api.views.product_views import Merge
from shared.contract.gguf_formats import GgufQuantization
from shared.contract.spec import Tier
from shared.errors import NotFound, Unavailable
from shared.jobs import metrics_file, pages, trainer_log
from shared.tenants.keys import Caller
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui/jobs", route_class=visits.PageRoute, include_in_schema=False)

EVENTS: Final = 100
CHECKPOINTS: Final = 100
MERGES: Final = 20
LOG_BYTES: Final = 32 * 1024  # of the end of the log, on the page


@router.get("/{job_id}")
def job_page(
    job_id: str,
    request: Request,
    door: DoorDep,
    visit: JobsVisitor,
    x: Axis = "step",
    attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None,
) -> Response:
    with door.session() as session:
        pages.job(session, job_id, project_id=visit.caller.project_id)
        newest = pages.newest_event(session, job_id)
    events = job_routes.list_events(job_id, door, visit.caller, limit=EVENTS)
    values = head_values(door, visit.caller, job_id)
    job: FineTuningJob = values["job"]
    return rendering.page(
        request,
        visit,
        "job.html",
        **values,
        **log_values(door, visit.caller, job, attempt=attempt),
        merges=merges_of(door, visit.caller, job, request),
        exports=exports_of(door, visit.caller, job, request),
        hub=bool(door.settings.push_url),
        quantizations=get_args(GgufQuantization),
        axis=x,
        axes=curves.AXES,
        tiers=get_args(Tier),
        charts=curves.CHARTS,
        newest=newest,
        events=[event for event in events.data if event.type == "message"],
        more_events=events.has_more,
        checkpoints=checkpoints_of(door, visit.caller, job_id),
        reasons={entry.get("field"): entry for entry in job.tunepool.auto},
        settled=flat(job.tunepool.spec or {}),
    )


def head_values(door: Door, caller: Caller, job_id: str) -> dict[str, Any]:
    """The values of the head of the page: they change while the job lives."""
    job, _ = job_routes.whole_job(door, caller, job_id)
    done, total = wording.progress(job)
    return {
        "job": job,
        "title": title_of(job),
        "situation": wording.situation(job),
        "done": done,
        "total": total,
        "spans": wording.time_line(job, now=time.time()),
        "unfinished": job.status in wording.UNFINISHED,
        "stopping": job.tunepool.cancel_requested_at is not None,
    }


def checkpoints_of(door: Door, caller: Caller, job_id: str) -> list[Checkpoint]:
    return job_routes.list_checkpoints(job_id, door, caller, limit=CHECKPOINTS).data


def merges_of(door: Door, caller: Caller, job: FineTuningJob, request: Request) -> list[Merge]:
    """Whole models that were made of the job's adapter, where the visitor may see models."""
    adapter = job.tunepool.adapter
    if adapter is None or not caller.may("models:read"):
        return []
    return merge_routes.of_model(door, caller, request, adapter.name, limit=MERGES)


def exports_of(door: Door, caller: Caller, job: FineTuningJob, request: Request) -> list[Export]:
    """The job's model as files for other servers, where the visitor may see models."""
    adapter = job.tunepool.adapter
    if adapter is None or not caller.may("models:read"):
        return []
    return export_routes.of_model(door, caller, request, adapter.name, limit=MERGES)


def log_values(door: Door, caller: Caller, job: FineTuningJob, *, attempt: int | None = None) -> dict[str, Any]:
    """The end of the trainer's log. What cannot be read of it is said in its place: the page is more than its log."""
    if not job.tunepool.attempts:
        return {"job_log": None, "log_attempt": attempt, "log_trouble": ""}
    try:
        ending = log_routes.end_of(door, caller, job.id, attempt=attempt, limit=LOG_BYTES)
    except (NotFound, Unavailable) as error:
        return {"job_log": None, "log_attempt": attempt, "log_trouble": error.message}
    return {"job_log": ending, "log_attempt": attempt, "log_trouble": ""}


@router.get("/{job_id}/log.txt")
def log_text(
    job_id: str, door: DoorDep, visit: JobsVisitor, attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None
) -> Response:
    """All that is kept of an attempt's log, as a file."""
    log, parts = log_routes.parts_of(door, visit.caller, job_id, attempt=attempt)
    headers = {"Content-Disposition": f'attachment; filename="{job_id}-{log.number}.log"'}
    return Response(trainer_log.joined(parts), media_type="text/plain; charset=utf-8", headers=headers)


def title_of(job: FineTuningJob) -> str:
    """What people call the job: its suffix, else its model."""
    return job.tunepool.suffix or job.model


_LEFT_OUT: Final = frozenset({"version", "facts"})


def flat(spec: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The spec's fields in dotted form."""
    fields: list[tuple[str, Any]] = []
    for name, value in spec.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, dict) and value:
            fields += flat(value, f"{prefix}{name}.")
        else:
            fields.append((f"{prefix}{name}", value))
    return fields


def message_rows(visit: SignedIn, events: list[Event]) -> str:
    return rendering.fragment("event_rows.html", visit, events=events)


@router.get("/{job_id}/events")
def events_page(
    job_id: str,
    request: Request,
    door: DoorDep,
    visit: JobsVisitor,
    after: After = None,
) -> Response:
    """Every event, those with figures too, newest first."""
    listed = job_routes.list_events(job_id, door, visit.caller, after=after, limit=200)
    return rendering.page(request, visit, "events.html", job_id=job_id, events=listed.data, more=listed.has_more)


@router.get("/{job_id}/curves")
def job_curves(job_id: str, door: DoorDep, visit: JobsVisitor, x: Axis = "step") -> Response:
    with door.session() as session:
        row = pages.job(session, job_id, project_id=visit.caller.project_id)
        history = metrics_file.metrics_history(session, [row.id])
    return JSONResponse(curves.document({"": curves.run_of(history[row.id], x)}))


@router.get("/{job_id}/metrics.csv")
def metrics_csv(job_id: str, door: DoorDep, visit: JobsVisitor) -> Response:
    """The raw figures, also of a job that has not ended."""
    with door.session() as session:
        pages.job(session, job_id, project_id=visit.caller.project_id)
        figures = metrics_file.recorded_metrics(session, job_id)
    headers = {"Content-Disposition": f'attachment; filename="{job_id}.csv"'}
    return Response(metrics_file.metrics_csv(figures), media_type="text/csv; charset=utf-8", headers=headers)


Order = Callable[[str, Door, Caller], Any]
ORDERS: Final[dict[str, Order]] = {
    "cancel": job_routes.cancel_job,
    "pause": job_routes.pause_job,
    "resume": job_routes.resume_job,
    "hold": lambda job_id, door, caller: operation_routes.hold_job(job_id, caller, door),
    "release": lambda job_id, door, caller: operation_routes.release_job(job_id, caller, door),
}


@router.post("/{job_id}/priority")
def set_priority(job_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    body = {"priority": form.number("priority"), "tier": form.get("tier")}
    operation_routes.set_priority(job_id, visit.caller, json.dumps(body).encode(), door)
    return visits.back(f"/ui/jobs/{job_id}")


@router.post("/{job_id}/{order}")
def order_job(job_id: str, order: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    give = ORDERS.get(order)
    if give is None:
        raise visits.no_such_page(f"/ui/jobs/{job_id}/{order}")
    give(job_id, door, visit.caller)
    return visits.back(f"/ui/jobs/{job_id}")
