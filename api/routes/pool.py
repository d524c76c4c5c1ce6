"""/v1/tunepool/pool, workers, devices: the devices, the queue that waits for them, and their operation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.body import RawBody, body_of, parse
from api.deps import Administrator, Door, DoorDep, JobsReader
from api.paging import After, Limit
from api.pool_bodies import EditPool, Quarantine, changes
from api.views import pool_views, usage_views
from shared.operating import administration
from shared.operating.overview import overview
from shared.tenants import audit
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool", tags=["pool"])


@router.get("/pool", response_model=pool_views.Pool)
def retrieve_pool(door: DoorDep, caller: JobsReader) -> pool_views.Pool:
    """Devices, workers, shares and the queue. Jobs and projects of others are not named without the scope admin."""
    return _pool(door, caller)


def _pool(door: Door, caller: Caller) -> pool_views.Pool:
    with door.session() as session:
        return pool_views.pool(overview(session, pool_name=door.settings.pool), caller=caller)


@router.patch("/pool", response_model=pool_views.Pool, openapi_extra=body_of(EditPool))
def edit_pool(caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.Pool:
    """Change the pool's rules; the next plan follows them."""
    wanted = changes(parse(body, EditPool))
    with door.session() as session:
        administration.edit_pool(session, caller, door.settings.pool, wanted, action="pool.edit")
    return _pool(door, caller)


@router.post("/pool/hold", response_model=pool_views.Pool)
def hold_pool(caller: Administrator, door: DoorDep) -> pool_views.Pool:
    """Start nothing more; what runs goes on."""
    return _hold(door, caller, held=True)


@router.post("/pool/release", response_model=pool_views.Pool)
def release_pool(caller: Administrator, door: DoorDep) -> pool_views.Pool:
    """Start jobs again."""
    return _hold(door, caller, held=False)


def _hold(door: Door, caller: Caller, *, held: bool) -> pool_views.Pool:
    action = "pool.hold" if held else "pool.release"
    with door.session() as session:
        administration.edit_pool(session, caller, door.settings.pool, {"held": held}, action=action)
    door.ring("training")
    return _pool(door, caller)


@router.get("/workers", response_model=pool_views.WorkerPage)
def list_workers(caller: Administrator, door: DoorDep) -> pool_views.WorkerPage:
    """Workers of every pool, also those that fell silent within the last day."""
    with door.session() as session:
        return pool_views.WorkerPage(data=[pool_views.worker(row) for row in administration.all_workers(session)])


@router.post("/workers/{worker_id}/drain", response_model=pool_views.Worker)
def drain_worker(worker_id: str, caller: Administrator, door: DoorDep) -> pool_views.Worker:
    """Its jobs save a checkpoint and wait again; it takes nothing more, also after a restart, until it is undrained."""
    with door.session() as session:
        return pool_views.worker(administration.set_draining(session, caller, worker_id, draining=True))


@router.post("/workers/{worker_id}/undrain", response_model=pool_views.Worker)
def undrain_worker(worker_id: str, caller: Administrator, door: DoorDep) -> pool_views.Worker:
    """Have a drained worker take work again."""
    with door.session() as session:
        return pool_views.worker(administration.set_draining(session, caller, worker_id, draining=False))


@router.post("/devices/{device_id}/quarantine", response_model=pool_views.DeviceView, openapi_extra=body_of(Quarantine))
def quarantine_device(device_id: str, caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.DeviceView:
    """Give the device to no job until it is released; a job that runs there goes on."""
    reason = parse(body, Quarantine).reason
    with door.session() as session:
        row = administration.set_quarantined(session, caller, device_id, quarantined=True, reason=reason)
        return pool_views.device(row)


@router.post("/devices/{device_id}/release", response_model=pool_views.DeviceView)
def release_device(device_id: str, caller: Administrator, door: DoorDep) -> pool_views.DeviceView:
    """Put a quarantined device back into the pool."""
    with door.session() as session:
        row = pool_views.device(administration.set_quarantined(session, caller, device_id, quarantined=False))
    door.ring("training")
    return row


@router.get("/audit", response_model=usage_views.AuditPage)
def list_audit(
    caller: Administrator,
    door: DoorDep,
    after: After = None,
    limit: Limit = 20,
    target: Annotated[str | None, Query(max_length=300, description="Only acts on the thing with this id.")] = None,
) -> usage_views.AuditPage:
    """Who operated what, newest first."""
    with door.session() as session:
        rows, more = audit.page(session, after=after, limit=limit, target=target)
        return usage_views.AuditPage(data=[usage_views.audit_entry(row) for row in rows], has_more=more)
