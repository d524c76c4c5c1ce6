"""/livez and /readyz: for supervisors and load balancers, without a key."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from api.deps import DoorDep
from shared import pool

router = APIRouter(tags=["health"])


class Live(BaseModel):
    status: str = "ok"


class Ready(BaseModel):
    status: str = "ok"
    queued: int
    running: int
    devices: int


@router.get("/livez", response_model=Live)
def live() -> Live:
    """The process answers."""
    return Live()


@router.get("/readyz", response_model=Ready)
def ready(door: DoorDep) -> Ready:
    """Database and store answer. Redis is not asked: without it jobs only start a little later."""
    door.store.check()
    with door.session() as session:
        view = pool.snapshot(session, pool_name=door.settings.pool)
    return Ready(queued=len(view.queue), running=len(view.running), devices=len(view.devices))
