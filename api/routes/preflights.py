"""/v1/tunepool/preflights: what a job would do, before it is submitted."""

from __future__ import annotations

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, JobsReader, JobsWriter
from api.paging import After, Limit
from api.views import preflight_views
from api.views.preflight_views import PreflightStatus
from shared.chores import preflights
from shared.contract.job_request import CreatePreflight
from shared.tenants import audit

router = APIRouter(prefix="/v1/tunepool/preflights", tags=["preflights"])


@router.post("", response_model=preflight_views.Preflight, openapi_extra=body_of(CreatePreflight))
def create_preflight(caller: JobsWriter, body: RawBody, door: DoorDep) -> preflight_views.Preflight:
    """Ask what a job with this body would do. Nothing is trained; poll until `status` is succeeded."""
    wanted = parse(body, CreatePreflight)
    base, parent = door.start(wanted.model, project_id=caller.project_id)
    with door.session() as session:
        view = preflight_views.preflight(preflights.create(session, wanted, caller=caller, base=base, parent=parent))
    door.ring("cpu")
    return view


@router.get("", response_model=preflight_views.PreflightPage)
def list_preflights(
    door: DoorDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    status: PreflightStatus | None = None,
) -> preflight_views.PreflightPage:
    """The project's preflights, newest first, each with its verdict only."""
    with door.session() as session:
        rows, more = preflights.page(session, project_id=caller.project_id, after=after, limit=limit, status=status)
        data = [preflight_views.preflight(row, whole=False) for row in rows]
    return preflight_views.PreflightPage(data=data, has_more=more)


@router.delete("/{preflight_id}", response_model=preflight_views.Preflight)
def cancel_preflight(preflight_id: str, door: DoorDep, caller: JobsWriter) -> preflight_views.Preflight:
    """End a preflight that has no answer yet. A key with the scope admin may end those of every project."""
    with door.session() as session:
        row = preflights.cancel(session, preflight_id, caller=caller)
        audit.record(session, caller, "preflight.cancel", preflight_id, before={"project_id": row.project_id})
        return preflight_views.preflight(row)


@router.get("/{preflight_id}", response_model=preflight_views.Preflight)
def retrieve_preflight(preflight_id: str, door: DoorDep, caller: JobsReader) -> preflight_views.Preflight:
    """One preflight with its whole report."""
    with door.session() as session:
        return preflight_views.preflight(preflights.find(session, preflight_id, project_id=caller.project_id))
