"""/ui/sweeps: one job in many settings, how each does, and which is best."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response

from api.deps import DoorDep
from api.paging import After
from api.routes import sweeps as sweep_routes
from api.ui import compare_pages, rendering, visits
from api.ui.visits import JobsOrderer, JobsVisitor, ProvenForm
from api.views.sweep_views import SweepView, TrialView

router = APIRouter(prefix="/ui/sweeps", route_class=visits.PageRoute, include_in_schema=False)

ROWS: Final = 50


@router.get("")
def sweeps_page(request: Request, door: DoorDep, visit: JobsVisitor, after: After = None) -> Response:
    listed = sweep_routes.list_sweeps(door, visit.caller, after=after, limit=ROWS)
    return rendering.page(request, visit, "sweeps.html", sweeps=listed.data, more=listed.has_more, after=after)


@router.get("/{sweep_id}")
def sweep_page(sweep_id: str, request: Request, door: DoorDep, visit: JobsVisitor) -> Response:
    """A sweep with its trials, the best first."""
    sweep = sweep_routes.retrieve_sweep(sweep_id, door, visit.caller)
    ranked = by_value(sweep)
    jobs = [("job", trial.job) for trial in ranked if trial.job is not None][: compare_pages.MOST]
    return rendering.page(
        request,
        visit,
        "sweep.html",
        sweep=sweep,
        trials=ranked,
        parameters=list(sweep.request.parameters),
        compared=urlencode(jobs),
    )


def by_value(sweep: SweepView) -> list[TrialView]:
    """Trials by how far they came, then by their best value; those without one last. Pure."""
    turned = 1.0 if sweep.better == "lower" else -1.0

    def place(trial: TrialView) -> tuple[bool, bool, int, float, int]:
        worth = 0.0 if trial.value is None else turned * trial.value
        return (trial.number != sweep.best, trial.value is None, -trial.rung, worth, trial.number)

    return sorted(sweep.trials, key=place)


@router.post("/{sweep_id}/pause")
def pause_sweep(sweep_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    sweep_routes.pause_sweep(sweep_id, door, visit.caller)
    return visits.back(f"/ui/sweeps/{sweep_id}")


@router.post("/{sweep_id}/resume")
def resume_sweep(sweep_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    sweep_routes.resume_sweep(sweep_id, door, visit.caller)
    return visits.back(f"/ui/sweeps/{sweep_id}")


@router.post("/{sweep_id}/cancel")
def cancel_sweep(sweep_id: str, door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    sweep_routes.cancel_sweep(sweep_id, door, visit.caller)
    return visits.back(f"/ui/sweeps/{sweep_id}")
