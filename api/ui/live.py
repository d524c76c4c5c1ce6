"""What keeps open pages fresh: one stream of server-sent events each. Parts of the page are sent when they changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from markupsafe import Markup

from api.deps import Door, DoorDep
from api.routes.streams import get_seat
from api.streams import SentEvent, StreamEnd
from api.ui import job_list_pages, job_pages, pool_pages, rendering, visits
from api.ui.curves import Axis, RunCurves
from api.ui.visits import JobsVisitor
from api.views.history_views import Event
from api.views.job_views import FineTuningJob
from shared.jobs import metrics_file, pages
from shared.jobs.metrics_file import Figures
from shared.tenants import sign_ins
from shared.tenants.sign_ins import SignedIn

router = APIRouter(prefix="/ui/live", route_class=visits.PageRoute, include_in_schema=False)

REFRESH_SECONDS: Final = 3.0  # of what no event tells: the place in the queue, the pool
GATHER_SECONDS: Final = 0.3  # so long news are gathered, so that a fast trainer does not redraw for each step
MOST_GATHERED: Final = 200
SCOPE: Final = "jobs:read"  # of JobsVisitor
Seat = Depends(get_seat)


def part(target: str, html: str, *, swap: str = "innerMorph") -> str:
    """A fragment for an element of the page, as htmx reads it from a stream."""
    return Markup('<hx-partial hx-target="#{}" hx-swap="{}">{}</hx-partial>').format(target, swap, Markup(html))  # noqa: S704  # rendered by our templates


class JobFollower:
    """One open page of a job."""

    def __init__(self, door: Door, visit: SignedIn, job_id: str, axis: Axis, attempt: int | None = None) -> None:
        self._door, self._visit, self._job_id = door, visit, job_id
        self._run = RunCurves(axis)
        self._attempt = attempt  # whose log is looked at; None: the newest one's
        self._head = self._came = self._log = ""
        self._whole = 0  # so many attempts there were when all of the newest log was known: it does not change

    def begin(self) -> None:
        """Learn the run so far. Raises NotFound."""
        with self._door.session() as session:
            pages.job(session, self._job_id, project_id=self._visit.caller.project_id)
            for figures in metrics_file.metrics_history(session, [self._job_id])[self._job_id]:
                self._run.add(figures)

    async def follow(self, seq: int) -> AsyncIterator[ServerSentEvent]:
        stream = self._door.streams.follow(self._job_id, after=seq)
        coming: asyncio.Future[SentEvent | StreamEnd] | None = None
        try:
            while True:
                events, coming, ended = await _gathered(stream, coming)
                for event in self._news(events):
                    yield event
                if not await run_in_threadpool(_stands, self._door, self._visit):
                    return
                for changed in await run_in_threadpool(self._changed_parts):
                    yield ServerSentEvent(raw_data=changed)
                if isinstance(ended, StreamEnd):
                    yield ServerSentEvent(event="end", raw_data=ended.status)
                if ended is not None:
                    return
        finally:
            if coming is not None:
                coming.cancel()

    def _news(self, items: list[SentEvent]) -> list[ServerSentEvent]:
        if not items:
            return []
        events = [Event.model_validate_json(item.body) for item in items]
        points: dict[str, list[tuple[float, float]]] = {}
        for event in events:
            if event.type == "metrics" and event.data is not None:
                at = datetime.fromtimestamp(event.created_at, tz=UTC)
                for name, point in self._run.add(Figures(at, event.data)).items():
                    points.setdefault(name, []).append(point)
        sent = []
        if points:
            sent.append(ServerSentEvent(event="points", raw_data=json.dumps(points)))
        messages = [event for event in reversed(events) if event.type == "message"]
        if messages:
            rows = job_pages.message_rows(self._visit, messages)
            sent.append(ServerSentEvent(raw_data=part("events", rows, swap="afterbegin")))
        sent.append(ServerSentEvent(event="seen", raw_data="", id=str(items[-1].seq)))
        return sent

    def _changed_parts(self) -> list[str]:
        """The head, what came of the job and the end of the log, where they changed."""
        values = job_pages.head_values(self._door, self._visit.caller, self._job_id)
        head = rendering.fragment("job_head.html", self._visit, **values)
        log = self._rendered_log(values["job"])
        came = self._came if head == self._head else self._rendered_products(values["job"])
        shown = (("head", self._head, head), ("came-of-it", self._came, came), ("log", self._log, log))
        self._head, self._came, self._log = head, came, log
        return [part(target, new) for target, old, new in shown if old != new]

    def _rendered_products(self, job: FineTuningJob) -> str:
        checkpoints = job_pages.checkpoints_of(self._door, self._visit.caller, job.id)
        return rendering.fragment("job_came.html", self._visit, job=job, checkpoints=checkpoints)

    def _rendered_log(self, job: FineTuningJob) -> str:
        attempts = len(job.tunepool.attempts)
        if attempts and attempts == self._whole:
            return self._log
        logged = job_pages.log_values(self._door, self._visit.caller, job, attempt=self._attempt)
        if logged["job_log"] is not None and logged["job_log"].state == "stored":
            self._whole = attempts
        return rendering.fragment("job_log.html", self._visit, **logged)


def get_follower(
    job_id: str,
    door: DoorDep,
    visit: JobsVisitor,
    x: Axis = "step",
    attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None,
) -> JobFollower:
    """Raises NotFound while that can still be told."""
    follower = JobFollower(door, visit, job_id, x, attempt)
    follower.begin()
    return follower


@router.get("/jobs/{job_id}", response_class=EventSourceResponse, dependencies=[Seat])
async def live_job(
    request: Request,
    follower: Annotated[JobFollower, Depends(get_follower)],
    after: Annotated[int, Query(ge=0)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """A job's page: its head when it changed, its new events, and `points` for its charts; `end` when it has ended."""
    known = request.headers.get("last-event-id", "")
    seq = int(known) if known.isascii() and known.isdigit() and len(known) < 18 else after
    async for event in follower.follow(seq):
        yield event


async def _gathered(
    stream: AsyncIterator[SentEvent | StreamEnd], coming: asyncio.Future[SentEvent | StreamEnd] | None
) -> tuple[list[SentEvent], asyncio.Future[SentEvent | StreamEnd] | None, StreamEnd | str | None]:
    """What came until now: events, the read that is still open, and whether the stream is over."""
    gathered: list[SentEvent] = []
    patience = REFRESH_SECONDS
    while len(gathered) < MOST_GATHERED:
        coming = coming or asyncio.ensure_future(anext(stream))
        await asyncio.wait({coming}, timeout=patience)
        if not coming.done():
            break
        try:
            item = coming.result()
        except StopAsyncIteration:
            return gathered, None, "over"
        coming = None
        if isinstance(item, StreamEnd):
            return gathered, None, item
        gathered.append(item)
        patience = GATHER_SECONDS
    return gathered, coming, None


@router.get("/pool", response_class=EventSourceResponse, dependencies=[Seat])
async def live_pool(door: DoorDep, visit: JobsVisitor) -> AsyncIterator[ServerSentEvent]:
    async for event in _refreshed(door, visit, "pool", lambda: pool_pages.pool_fragment(door, visit)):
        yield event


@router.get("/jobs", response_class=EventSourceResponse, dependencies=[Seat])
async def live_jobs(request: Request, door: DoorDep, visit: JobsVisitor) -> AsyncIterator[ServerSentEvent]:
    # Of one's own project only: a stream looks again whether jobs may be read, not whether others' may.
    wanted = job_list_pages.wanted(request)._replace(project=None)
    async for event in _refreshed(door, visit, "jobs", lambda: job_list_pages.rows_fragment(door, visit, wanted)):
        yield event


def _stands(door: Door, visit: SignedIn) -> bool:
    """A stream ends with its sign-in, its key and its key's scope, not only when it is asked for again."""
    with door.reading() as session:
        return sign_ins.stands(session, visit.token, door.settings, scope=SCOPE)


async def _refreshed(
    door: Door, visit: SignedIn, target: str, render: Callable[[], str]
) -> AsyncIterator[ServerSentEvent]:
    """The part of a page whenever it has changed, until the stream has lasted its time."""
    shown, left = "", door.settings.stream_seconds
    while left > 0 and await run_in_threadpool(_stands, door, visit):
        html = await run_in_threadpool(render)
        if html != shown:
            shown = html
            yield ServerSentEvent(raw_data=part(target, html))
        await asyncio.sleep(REFRESH_SECONDS)
        left -= REFRESH_SECONDS
