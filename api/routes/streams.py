"""/v1/tunepool/jobs/…/events/stream: a job's events as they happen, as server-sent events."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.deps import DoorDep, JobsReader
from api.streams import StreamEnd
from shared.errors import Invalid
from shared.jobs import pages

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])

RETRY_MILLISECONDS: Final = 3000
_EVENT_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,17}")


def get_place(
    job_id: str,
    door: DoorDep,
    caller: JobsReader,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> int:
    """The number of the last event that the client knows. Raises NotFound, Invalid while both can still be told."""
    if last_event_id is not None and _EVENT_NUMBER.fullmatch(last_event_id) is None:
        raise Invalid("Last-Event-ID must be the `id` of an event of this stream: a number.", param="Last-Event-ID")
    with door.session() as session:
        pages.job(session, job_id, project_id=caller.project_id)
        newest = pages.newest_event(session, job_id)
    place = int(last_event_id or 0)
    if place > newest:
        raise Invalid(
            f"Last-Event-ID {place} is no event of this job; its newest is {newest}. Leave the header out to begin "
            "with the first.",
            param="Last-Event-ID",
        )
    return place


async def get_seat(door: DoorDep) -> AsyncIterator[None]:
    with door.streams.seat():
        yield


@router.get("/jobs/{job_id}/events/stream", response_class=EventSourceResponse, dependencies=[Depends(get_seat)])
async def stream_events(
    job_id: str, door: DoorDep, place: Annotated[int, Depends(get_place)]
) -> AsyncIterator[ServerSentEvent]:
    """Events of a job as they happen, oldest first, then `event: end` once the job has ended.

    `id` is the event's number in the job, `data` the event as the list has it. A client that comes again with
    `Last-Event-ID` misses none and gets none twice. A quiet stream carries a comment every 15 s; after a quarter of an
    hour (by default) the server ends it and the client comes again.
    """
    yield ServerSentEvent(retry=RETRY_MILLISECONDS)
    async for item in door.streams.follow(job_id, after=place):
        if isinstance(item, StreamEnd):
            yield ServerSentEvent(event="end", data={"status": item.status})
        else:
            yield ServerSentEvent(id=str(item.seq), raw_data=item.body)
