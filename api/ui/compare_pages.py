"""/ui/compare: several runs over each other, the fields in which they differ, and what they reached."""

from __future__ import annotations

from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from api.deps import Door, DoorDep
from api.ui import curves, rendering, visits
from api.ui.curves import Axis, RunCurves
from api.ui.job_pages import flat, title_of
from api.ui.visits import JobsVisitor
from api.views import job_views
from api.views.job_views import FineTuningJob
from shared.errors import Invalid
from shared.jobs import metrics_file, pages
from shared.tenants.keys import Caller

router = APIRouter(prefix="/ui/compare", route_class=visits.PageRoute, include_in_schema=False)

MOST: Final = 8
Jobs = Annotated[list[str] | None, Query(max_length=100)]


def _compared(door: Door, caller: Caller, job_ids: list[str], axis: Axis) -> list[tuple[FineTuningJob, RunCurves]]:
    """The jobs of this project among those named, each with its whole run: two queries."""
    wanted = list(dict.fromkeys(job_ids))
    if len(wanted) > MOST:
        raise Invalid(f"At most {MOST} jobs are compared, not {len(wanted)}. Untick some.", param="job")
    with door.session() as session:
        rows = pages.several(session, wanted, project_id=caller.project_id)
        jobs = [job_views.job(row, caller=caller) for row in rows]
        history = metrics_file.metrics_history(session, [row.id for row in rows])
    return [(job, curves.run_of(history[job.id], axis)) for job in jobs]


@router.get("")
def compare_page(request: Request, door: DoorDep, visit: JobsVisitor, job: Jobs = None, x: Axis = "step") -> Response:
    compared = _compared(door, visit.caller, job or [], x)
    others = _others(door, visit.caller, {entry.id for entry, _ in compared})
    query = urlencode([("job", entry.id) for entry, _ in compared])
    return rendering.page(
        request,
        visit,
        "compare.html",
        compared=[(entry, title_of(entry), run) for entry, run in compared],
        fields=differing([entry for entry, _ in compared]),
        others=others,
        query=query,
        axis=x,
        axes=curves.AXES,
        charts=curves.CHARTS,
    )


def _others(door: Door, caller: Caller, shown: set[str]) -> list[tuple[FineTuningJob, str]]:
    """The newest jobs that could be added."""
    with door.reading() as session:
        rows, _ = pages.jobs(
            session, project_id=caller.project_id, after=None, limit=30, metadata=None, without_metadata=False
        )
    jobs = [job_views.job(row, caller=caller) for row in rows if row.id not in shown]
    return [(entry, title_of(entry)) for entry in jobs]


def differing(jobs: list[FineTuningJob]) -> list[tuple[str, list[Any], bool]]:
    """Every field of the specs and the metadata with its value in each job, and whether they differ; those first."""
    values = [dict(_fields(job)) for job in jobs]
    names = list(dict.fromkeys(name for fields in values for name in fields))
    table = [(name, [fields.get(name) for fields in values]) for name in names]
    marked = [(name, row, any(value != row[0] for value in row)) for name, row in table]
    return sorted(marked, key=lambda entry: not entry[2])


def _fields(job: FineTuningJob) -> list[tuple[str, Any]]:
    own = [("model", job.model), ("training_file", job.training_file), ("validation_file", job.validation_file)]
    labels = [(f"metadata.{name}", value) for name, value in (job.metadata or {}).items()]
    return [*own, *labels, *flat(job.tunepool.spec or {})]


@router.get("/curves")
def compared_curves(door: DoorDep, visit: JobsVisitor, job: Jobs = None, x: Axis = "step") -> Response:
    compared = _compared(door, visit.caller, job or [], x)
    titles = [title_of(entry) for entry, _ in compared]
    runs = {
        title if titles.count(title) == 1 else f"{title} {rendering.short(entry.id)}": run
        for title, (entry, run) in zip(titles, compared, strict=True)
    }
    return JSONResponse(curves.document(runs))
