"""Streams of job events. One reader per process serves all clients and all jobs that they follow.

The events of a job are numbered without gaps, so a stream is right when `seq + 1` follows `seq` and nothing else does.
No thread and no database session waits with a client: a stream sleeps until the reader has seen something new.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from api.views import history_views
from shared.errors import LimitReached
from shared.jobs import pages
from shared.store.lifecycle import TERMINAL
from shared.store.tables import EventRow

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.5  # how old news may be before they are sent
KEPT_EVENTS: Final = 32  # of each followed job, so that the streams of one job share what the reader found
PAGE_EVENTS: Final = 200  # of a replay, read at once

OpenSession = Callable[[], AbstractContextManager[Session]]


class SentEvent(NamedTuple):
    """An event as a stream sends it."""

    seq: int
    body: str  # history_views.Event as JSON


class StreamEnd(NamedTuple):
    """The job has ended, and every event of it was sent."""

    status: str


@dataclass
class Tail:
    """The end of one job's journal, as the last look found it; shared by all who follow the job."""

    seq: int
    status: str | None = None
    recent: deque[SentEvent] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    followers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, status: str, events: Sequence[SentEvent]) -> None:
        """Note what a look found, and wake the followers if anything changed."""
        if events or status != self.status:
            self.recent.extend(events)
            self.seq = events[-1].seq if events else self.seq
            self.status = status
            self.wake()

    def wake(self) -> None:
        waiting, self.news = self.news, asyncio.Event()
        waiting.set()

    def behind(self, seq: int) -> list[SentEvent] | None:
        """The events after `seq`; None when the first of them is no longer kept here."""
        if seq >= self.seq:
            return []
        kept = [event for event in self.recent if event.seq > seq]
        return kept if kept and kept[0].seq == seq + 1 else None


class Streams:
    """Every open stream of this process. Lives on one event loop.

    Args:
        limit: streams at once.
        seconds: how long a stream lasts before its client has to come again, with a key that is still good.
    """

    def __init__(self, session: OpenSession, *, limit: int, seconds: float) -> None:
        self._session = session
        self._limit = limit
        self._seconds = seconds
        self.open = 0
        self._tails: dict[str, Tail] = {}
        self._joined = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Room for one more stream. Raises LimitReached."""
        if self.open >= self._limit:
            raise LimitReached(
                f"This server already sends {self._limit} event streams. Close some, or poll the job instead.",
                code="too_many_streams",
            )
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def follow(self, job_id: str, *, after: int) -> AsyncIterator[SentEvent | StreamEnd]:
        """The job's events behind number `after` as they come, `Ended` when there will be no more.

        Returns without it once the stream has lasted its time: the client comes again with the last number it saw.
        """
        seq, until = after, time.monotonic() + self._seconds
        with self._following(job_id, after) as (tail, reader):
            while (left := until - time.monotonic()) > 0 and not reader.done():
                news = tail.news  # before looking, so that nothing slips in between
                for event in await self._next(job_id, tail, seq):
                    yield event
                    seq = event.seq
                if seq < tail.seq:
                    continue
                if tail.status in TERMINAL:
                    yield StreamEnd(tail.status)
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left)

    @contextmanager
    def _following(self, job_id: str, after: int) -> Iterator[tuple[Tail, asyncio.Task[None]]]:
        tail = self._tails.setdefault(job_id, Tail(seq=after))
        tail.followers += 1
        self._joined.set()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name="event-streams")
            self._reader.add_done_callback(self._close_all)
        try:
            yield tail, self._reader
        finally:
            tail.followers -= 1
            if not tail.followers:
                del self._tails[job_id]

    async def _next(self, job_id: str, tail: Tail, seq: int) -> Sequence[SentEvent]:
        """The events after `seq`: from the tail if it reaches back that far, else a page from the database."""
        kept = tail.behind(seq)
        if kept is not None:
            return kept
        try:
            return await run_in_threadpool(self._page, job_id, seq)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            log.warning("stream.waits", job_id=job_id, error=str(error)[:200])
            await asyncio.sleep(LOOK_SECONDS)
            return ()

    def _page(self, job_id: str, seq: int) -> list[SentEvent]:
        with self._session() as session:
            return [_told(row) for row in pages.events_behind(session, job_id, seq=seq, limit=PAGE_EVENTS)]

    # --- the reader --------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Read all tails in one query, repeatedly while there are any."""
        while self._tails:
            self._joined.clear()
            try:
                news = await run_in_threadpool(self._look, {job_id: tail.seq for job_id, tail in self._tails.items()})
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                log.warning("streams.wait", error=str(error)[:200])  # clients get pings until the database is back
                news = {}
                await asyncio.sleep(LOOK_SECONDS)
            for job_id, (status, events) in news.items():
                if job_id in self._tails:
                    self._tails[job_id].take(status, events)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._joined.wait(), LOOK_SECONDS)

    def _look(self, watched: Mapping[str, int]) -> dict[str, tuple[str, list[SentEvent]]]:
        with self._session() as session:
            news_by_job = pages.news(session, watched, limit=KEPT_EVENTS)
            return {job_id: (news.status, [_told(row) for row in news.events]) for job_id, news in news_by_job.items()}

    def _close_all(self, reader: asyncio.Task[None]) -> None:
        """End all streams when the reader fails: their clients reconnect and continue where they were."""
        if not reader.cancelled() and (error := reader.exception()) is not None:
            log.error("streams.failed", exc_info=error)
        for tail in self._tails.values():
            tail.wake()


def _told(row: EventRow) -> SentEvent:
    return SentEvent(row.seq, history_views.event(row).model_dump_json())
