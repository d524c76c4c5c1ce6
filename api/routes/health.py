"""/livez and /readyz: for supervisors and load balancers, without a key."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from api.deps import Door, DoorDep
from shared.jobs import pages
from shared.store import bell, schema

router = APIRouter(tags=["health"])


class Live(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Database and store answer. Without Redis jobs only start a little later, so its absence is told and no fault."""

    status: Literal["ok"] = "ok"
    redis: Literal["ok", "away", "none"]
    queued: int
    running: int
    devices: int
    unusable_models: dict[str, str] = Field(
        default={}, description="Entries of this API's models.toml that cannot be used, each with the reason."
    )
    resolving_models: dict[str, str] = Field(
        default={}, description="Entries whose facts a worker looks up at the hub, each with what holds it up."
    )


@router.get("/livez", response_model=Live)
def live() -> Live:
    """The process answers."""
    return Live()


@router.get("/readyz", response_model=Ready)
async def ready(door: DoorDep) -> Ready:
    """Ready to accept files and jobs; 503 while database or store are away, or a migration is missing."""
    await door.store.check()
    return await run_in_threadpool(_look, door)


def _look(door: Door) -> Ready:
    with door.session() as session:
        schema.must_serve(session)
        counts, devices = pages.unfinished(session), len(pages.devices(session, pool_name=door.settings.pool))
    catalogue = door.catalogue
    return Ready(
        redis=_redis(door),
        queued=counts.get("queued", 0),
        running=counts.get("running", 0),
        devices=devices,
        unusable_models=catalogue.complaints(),
        resolving_models={name: entry.note for name, entry in catalogue.pending.items()},
    )


def _redis(door: Door) -> Literal["ok", "away", "none"]:
    if not door.settings.redis_url:
        return "none"
    return "ok" if bell.answers(door.settings) else "away"
