"""/v1/tunepool/jobs/ID/logs: what the trainer printed, while it runs and afterwards."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query, Response

from api.body import written
from api.deps import Door, DoorDep, JobsReader
from api.views import log_views
from shared.errors import NotFound
from shared.jobs import pages, trainer_log
from shared.jobs.trainer_log import AttemptLog
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool/jobs", tags=["fine-tuning"])

MOST_BYTES: Final = 1024 * 1024
OFFSETS: Final = 2**53  # what JSON's numbers hold


@router.get("/{job_id}/logs", response_model=log_views.JobLog)
def read_log(
    job_id: str,
    door: DoorDep,
    caller: JobsReader,
    attempt: Annotated[int | None, Query(ge=1, le=10_000, description="By default the newest.")] = None,
    after: Annotated[int, Query(ge=0, le=OFFSETS, description="`next` of the answer before, to go on.")] = 0,
    limit: Annotated[int, Query(ge=4096, le=MOST_BYTES, description="Bytes of an answer.")] = 64 * 1024,
) -> Response:
    """What the trainer of an attempt printed, from an offset on. Ask again with `next` to follow it."""
    log, parts = parts_of(door, caller, job_id, attempt=attempt)
    return written(log_views.job_log(job_id, log, trainer_log.cut(parts, after=after, limit=limit)))


def end_of(door: Door, caller: Caller, job_id: str, *, attempt: int | None, limit: int) -> log_views.JobLog:
    """The last lines. Raises NotFound."""
    log, parts = parts_of(door, caller, job_id, attempt=attempt)
    return log_views.job_log(job_id, log, trainer_log.last(parts, limit=limit))


def parts_of(
    door: Door, caller: Caller, job_id: str, *, attempt: int | None = None
) -> tuple[AttemptLog, list[tuple[int, bytes]]]:
    """A log with all that is known of it: (offset, UTF-8), in order. Raises NotFound, Unavailable."""
    with door.reading() as session:
        job = pages.job(session, job_id, project_id=caller.project_id)
        log = trainer_log.of_attempt(session, job, number=attempt)
        if log.stored is None:
            return log, trainer_log.pieces(session, job_id, log.fence)
    try:
        content = b"".join(door.store.chunks(log.stored.key))
    except NotFound as error:
        raise NotFound(f"The log of attempt {log.number} is gone from the object store.", code="log_gone") from error
    return log, trainer_log.parts_of(log.stored, content)
