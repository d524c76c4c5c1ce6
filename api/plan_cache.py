"""The pool's plan, shared by all requests that ask why a job waits. A thread makes one a second at most."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import Engine

from api.plan_process import PlanAnswer, Planner
from shared.plan.verdicts import Verdict

PLAN_SECONDS: Final = 1.0
# A plan of 10,000 waiting jobs takes 0.2 s. With this, planning costs a process a tenth of one core at the most.
COST_FACTOR: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Latest:
    """A plan and when it was begun."""

    plan: PlanAnswer
    begun: float

    def age(self) -> float:
        return time.monotonic() - self.begun

    @property
    def rest(self) -> float:
        return COST_FACTOR * self.plan.seconds

    @property
    def life(self) -> float:
        return max(PLAN_SECONDS, self.rest)

    def knows(self, job_id: str) -> bool:
        return job_id in self.plan.verdicts or job_id in self.plan.starting


class PlannedPlace(NamedTuple):
    """The plan's word on one queued job. Neither a verdict nor `starting`: it was queued after the plan was made."""

    verdict: Verdict | None
    starting: bool
    as_of: datetime


class PlanCache:
    """The pool's latest plan, shared by all requests of the process."""

    def __init__(self, engine: Engine, *, pool_name: str) -> None:
        self._planner = Planner(engine, pool_name=pool_name)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outlook")
        self._lock = threading.Lock()
        self._latest: _Latest | None = None
        self._next: Future[_Latest] | None = None

    def of(self, job_id: str) -> PlannedPlace:
        """The plan's answer for a job. It is at most two seconds old, or twenty times the time that planning takes.

        Holds no database session of the caller's while it waits: call it between sessions.
        """
        asked, latest = time.monotonic(), self._latest
        if (
            latest is None
            or latest.age() > 2 * latest.life
            or (latest.age() > latest.rest and not latest.knows(job_id))
        ):
            latest = self._planned().result()
            if latest.begun < asked and not latest.knows(job_id):  # it was under way when the job came
                latest = self._planned().result()
        elif latest.age() > latest.life:
            self._planned()
        plan = latest.plan
        return PlannedPlace(plan.verdicts.get(job_id), job_id in plan.starting, plan.as_of)

    def blocked(self) -> Counter[tuple[str, str]]:
        """How many jobs wait by (project, reason), as of a plan like that of `of`. Raises SQLAlchemy's errors."""
        latest = self._latest
        if latest is None or latest.age() > 2 * latest.life:
            latest = self._planned().result()
        return latest.plan.blocked

    def _planned(self) -> Future[_Latest]:
        """The plan that is being made now; begins one if none is."""
        with self._lock:
            if self._next is None or self._next.done():
                self._next = self._thread.submit(self._make)
            return self._next

    def _make(self) -> _Latest:
        begun = time.monotonic()
        self._latest = _Latest(self._planner.plan(), begun)
        return self._latest

    def close(self) -> None:
        self._thread.submit(self._planner.close)
        self._thread.shutdown(wait=False)
