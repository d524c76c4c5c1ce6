"""Why queued jobs wait, for everybody who asks: one plan a second at most, made beside the requests and not in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from shared import pool
from shared.verdicts import Verdict

PLAN_SECONDS: Final = 1.0
# A plan of 10,000 waiting jobs takes 0.2 s. With this, planning costs a process a tenth of one core at the most.
COST_FACTOR: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """A plan, when it was begun, and what it cost."""

    verdicts: Mapping[str, Verdict]
    starting: frozenset[str]  # jobs that a worker is about to start
    as_of: datetime  # the database's clock
    begun: float
    seconds: float

    def age(self) -> float:
        return time.monotonic() - self.begun


class Look(NamedTuple):
    """What the plan says of a queued job. Neither a verdict nor `starting`: it was queued after the plan was made."""

    verdict: Verdict | None
    starting: bool
    as_of: datetime


class Outlook:
    """The pool's latest plan, shared by all requests of the process."""

    def __init__(self, session: Callable[[], AbstractContextManager[Session]], *, pool_name: str) -> None:
        self._session = session
        self._pool_name = pool_name
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outlook")
        self._lock = threading.Lock()
        self._plan: _Plan | None = None
        self._next: Future[_Plan] | None = None

    def of(self, job_id: str) -> Look:
        """Never older than two seconds, or than twenty times what a plan costs where that is more.

        Holds no database session of the caller's while it waits: call it between sessions.
        """
        asked, plan = time.monotonic(), self._plan
        if plan is None or plan.age() > 2 * _life(plan) or (plan.age() > _rest(plan) and not _knows(plan, job_id)):
            plan = self._planned().result()
            if plan.begun < asked and not _knows(plan, job_id):  # it was under way when the job came
                plan = self._planned().result()
        elif plan.age() > _life(plan):
            self._planned()
        return Look(plan.verdicts.get(job_id), job_id in plan.starting, plan.as_of)

    def _planned(self) -> Future[_Plan]:
        """The plan that is being made now; begins one if none is."""
        with self._lock:
            if self._next is None or self._next.done():
                self._next = self._planner.submit(self._make)
            return self._next

    def _make(self) -> _Plan:
        begun = time.monotonic()
        with self._session() as session:
            view = pool.snapshot(session, pool_name=self._pool_name)
        made = pool.make_plan(view)
        for job_id in made.verdicts:
            made.verdicts[job_id]  # the first to be worded works out the forecast for all
            break
        starting = frozenset(assignment.job_id for assignment in made.assignments)
        self._plan = _Plan(made.verdicts, starting, view.now, begun, time.monotonic() - begun)
        return self._plan

    def close(self) -> None:
        self._planner.shutdown(wait=False, cancel_futures=True)


def _rest(plan: _Plan) -> float:
    return COST_FACTOR * plan.seconds


def _life(plan: _Plan) -> float:
    return max(PLAN_SECONDS, _rest(plan))


def _knows(plan: _Plan, job_id: str) -> bool:
    return job_id in plan.verdicts or job_id in plan.starting
