"""/v1/tunepool/sweeps: one job in many settings."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from fastapi import APIRouter, Header, Request

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.request_span import of_request
from api.trial_bodies import trials_of
from api.views import sweep_views
from api.views.sweep_views import SweepPage, SweepView
from shared.chores import sweep_rounds, sweeps
from shared.contract.sweep import CreateSweep
from shared.ids import new_id
from shared.tenants import audit

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

BODY: Final = body_of(
    CreateSweep,
    example={
        "name": "rates",
        "job": {
            "model": "smollm2-135m-instruct",
            "training_file": "file-0193a1b2c3d4e5f60718293a4b5c6d7e",
            "validation_file": "file-0193a1b2c3d4e5f60718293a4b5c6d7f",
        },
        "parameters": {
            "tunepool.training.learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"},
            "tunepool.adapter.r": {"values": [8, 16, 32]},
        },
        "strategy": {"type": "halving", "trials": 9, "factor": 3, "first_step": 20},
        "budget_device_seconds": 7200,
    },
)
IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", pattern=r"^[\x21-\x7e]+$", min_length=1, max_length=255)
]


@router.post("/sweeps", response_model=SweepView, openapi_extra=BODY)
def create_sweep(
    asked: Request, caller: JobsWriter, body: RawBody, door: DoorDep, idempotency_key: IdempotencyKey = None
) -> SweepView:
    """Try a job in many settings. Every trial is checked as a submit is before any of them starts.

    Its trials are ordinary jobs, of the group that the sweep's id names. The janitor moves it on.
    """
    wanted = parse(body, CreateSweep)
    sweep_id = new_id("sweep_")
    trials = trials_of(wanted, sweep_id)
    base, parent = door.start(wanted.job.model, project_id=caller.project_id)
    with door.session() as session:
        row = sweeps.create(
            session,
            sweep_id,
            wanted,
            trials,
            caller=caller,
            base=base,
            parent=parent,
            request_sha256=hashlib.sha256(body).hexdigest(),
            idempotency_key=idempotency_key,
            traceparent=of_request(asked),
        )
        if row.id == sweep_id:  # else it was made before, by the same key
            audit.record(session, caller, "sweep.create", row.id, after={"trials": len(trials)})
        sweep_rounds.advance(session, row.id, settings=door.settings)
        view = sweep_views.sweep(sweeps.seen(session, row))
    door.ring("cpu")
    return view


@router.get("/sweeps", response_model=SweepPage)
def list_sweeps(
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
) -> SweepPage:
    """The project's sweeps, newest first, without their trials."""
    with door.session() as session:
        rows, more = sweeps.page(session, project_id=caller.project_id, after=after, limit=limit)
        counts = sweeps.counts(session, [row.id for row in rows])
        return SweepPage(data=[sweep_views.head(row, counts[row.id]) for row in rows], has_more=more)


@router.get("/sweeps/{sweep_id}", response_model=SweepView)
def retrieve_sweep(sweep_id: str, door: DoorDep, caller: JobsReader) -> SweepView:
    """A sweep with all its trials: what each takes, how it does, and what it costs."""
    with door.session() as session:
        return sweep_views.sweep(sweeps.seen(session, sweeps.find(session, sweep_id, project_id=caller.project_id)))


@router.post("/sweeps/{sweep_id}/cancel", response_model=SweepView)
def cancel_sweep(sweep_id: str, door: DoorDep, caller: JobsWriter) -> SweepView:
    """Cancel a sweep with its jobs: what waits at once, what runs within seconds. Cancelling twice is fine."""
    with door.session() as session:
        row = sweeps.cancel(session, sweep_id, project_id=caller.project_id)
        audit.record(session, caller, "sweep.cancel", row.id)
        view = sweep_views.sweep(sweeps.seen(session, row))
    door.ring("training")
    return view


@router.post("/sweeps/{sweep_id}/pause", response_model=SweepView)
def pause_sweep(sweep_id: str, door: DoorDep, caller: JobsWriter) -> SweepView:
    """Start and compare nothing more until it is resumed. Jobs that wait or run go on."""
    return _set_paused(sweep_id, door, caller, paused=True)


@router.post("/sweeps/{sweep_id}/resume", response_model=SweepView)
def resume_sweep(sweep_id: str, door: DoorDep, caller: JobsWriter) -> SweepView:
    """Let a paused sweep go on."""
    return _set_paused(sweep_id, door, caller, paused=False)


def _set_paused(sweep_id: str, door: DoorDep, caller: JobsWriter, *, paused: bool) -> SweepView:
    with door.session() as session:
        row = sweeps.set_paused(session, sweep_id, paused=paused, project_id=caller.project_id)
        audit.record(session, caller, "sweep.pause" if paused else "sweep.resume", row.id)
        return sweep_views.sweep(sweeps.seen(session, row))
