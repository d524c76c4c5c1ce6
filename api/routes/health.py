"""/livez and /readyz: for supervisors and load balancers, without a key."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Final, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from api.deps import Door, DoorDep
from api.readiness import SharedLook
from shared.jobs import pages
from shared.store import bell, schema

router = APIRouter(tags=["health"])


VERSION: Final = version("tunepool-server")


class Live(BaseModel):
    status: Literal["ok"] = "ok"
    version: str = Field(default=VERSION, description="Of this server; the OpenAPI document has it, too.")


class Ready(BaseModel):
    """Database and store answer. Redis may be away: jobs then start a little later, and the answer says so."""

    status: Literal["ok"] = "ok"
    redis: Literal["ok", "away", "none"]
    queued: int | None = Field(default=None, description="With an API key only; so are the other two counts.")
    running: int | None = None
    devices: int | None = None
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
async def ready(request: Request, door: DoorDep) -> Ready:
    """Ready to accept files and jobs; 503 while database or store are away, or a migration is missing.

    Looked up once a second at most, for all who ask. Counts are told to those who send an API key.
    """
    seen = await _shared(request, door).take()
    if "authorization" not in request.headers:
        return seen.model_copy(update={"queued": None, "running": None, "devices": None})
    await run_in_threadpool(door.caller, request)
    return seen


def _shared(request: Request, door: Door) -> SharedLook[Ready]:
    state = request.app.state
    if not hasattr(state, "ready"):
        state.ready = SharedLook(partial(_check, door))
    shared: SharedLook[Ready] = state.ready
    return shared


async def _check(door: Door) -> Ready:
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
