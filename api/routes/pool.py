"""/v1/tunepool/pool: what there is to train on, and how much waits."""

from __future__ import annotations

from fastapi import APIRouter

from api import views
from api.deps import DoorDep, JobsReader
from shared import pages

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])


@router.get("/pool", response_model=views.Pool)
def retrieve_pool(door: DoorDep, caller: JobsReader) -> views.Pool:
    """Devices of the pool, and how many jobs of all projects stand where. Other projects' jobs are not named."""
    with door.session() as session:
        rows = pages.devices(session, pool_name=door.settings.pool)
        leased = [row.leased_by for row in rows if row.leased_by is not None]
        own = pages.own_jobs(session, leased, project_id=caller.project_id)
        counts = pages.unfinished(session)
    return views.Pool(
        name=door.settings.pool,
        devices=[views.device(row, own=own) for row in rows],
        jobs=views.JobCounts.model_validate(counts),
    )
