"""Tidies up behind everybody: `python -m worker.janitor`. Any number may run; each pass happens under an advisory lock.

Dead leases go back to the queue, waiting work is rung for, sweeps move on, expired files and the garbage of dead fences
are deleted.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared import failpoints
from shared import log as logs
from shared.chores import cold_jobs, deliveries, preflights, schedule_runs, schedules, sweep_rounds
from shared.chores import table as chores
from shared.chores import waiting as lanes
from shared.errors import Unavailable
from shared.fleet import members, playgrounds, workers
from shared.jobs import moves
from shared.operating import approvals
from shared.operating.secrecy import hide_secrets
from shared.products import files, garbage, parted_uploads
from shared.settings import Settings
from shared.store import locks, schema
from shared.store.bell import call, ring
from shared.store.db import database_age_seconds, make_engine, session_scope
from shared.store.lifecycle import Lane
from shared.store.storage import Store, open_store
from shared.tenants import rotation, sign_ins
from worker.host.flags import LANES
from worker.host.host import AWAY

log = structlog.get_logger()
T = TypeVar("T")

SWEEP_GARBAGE_SECONDS: Final = 3600.0
FIRST_GARBAGE_SECONDS: Final = 60.0


@dataclass
class Rounds:
    """When each pass is next due, on the monotonic clock. Pure: the caller tells the time."""

    settings: Settings
    began: float
    looked_at: float = field(init=False)
    quiet_until: float = 0.0

    def __post_init__(self) -> None:
        self.looked_at = self.began

    def may_reap(self, *, now: float, database_age: float) -> bool:
        """False while live workers may have had no time to beat: after a restart of Postgres, after our own pause."""
        if now - self.looked_at > self.settings.lease_seconds:
            self.quiet_until = now + self.settings.lease_seconds
        return now >= self.quiet_until and database_age >= self.settings.lease_seconds

    def looked(self, *, now: float) -> None:
        """A pass over the leases went through, ours or another janitor's; only that ends a pause."""
        self.looked_at = now


class Janitor:
    """One loop over all passes."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._engine: Engine = make_engine(settings.database_url, pool_size=1, max_overflow=0)
        self._rounds = Rounds(settings, began=clock())
        self._over = threading.Event()
        self._served = False  # by the schema
        now = clock()
        self._due: dict[Callable[[], None], tuple[float, float]] = {
            self.reap: (now, settings.reap_seconds),
            self.advance_sweeps: (now, settings.reap_seconds),
            self.sweep: (now + settings.sweep_seconds, settings.sweep_seconds),
            self.keep_time: (now, settings.sweep_seconds),
            self.collect: (now + FIRST_GARBAGE_SECONDS, SWEEP_GARBAGE_SECONDS),
        }

    def stop(self) -> None:
        """End after the pass at hand; safe in a signal handler."""
        self._over.set()

    def run(self) -> None:
        while not self._over.is_set():
            for act, (due, period) in list(self._due.items()):
                if self._clock() >= due:
                    self._due[act] = (self._clock() + period, period)
                    self._try(act)
            self._over.wait(max(0.0, min(due for due, _ in self._due.values()) - self._clock()))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            if not self._served:
                with session_scope(self._engine) as session:
                    schema.must_serve(session)
                self._served = True
            act()
        except (*AWAY, Unavailable) as error:
            log.warning("janitor.unheard", act=act.__name__, error=str(error)[:200])

    def _alone(self, name: str, verb: Callable[[Session], T]) -> T | None:
        """Run `verb` unless another janitor is at it right now."""
        with session_scope(self._engine) as session:
            return verb(session) if locks.is_alone(session, f"janitor:{name}") else None

    # --- the passes -------------------------------------------------------------------------------------------------

    def reap(self) -> None:
        """Take back the jobs and chores of dead leases, and have somebody start them again."""
        taken = self._alone("reap", self._reap)
        self._rounds.looked(now=self._clock())
        if taken:
            log.warning("leases.reaped", ids=taken)
            for lane in LANES:
                ring(lane, self._settings)

    def _reap(self, session: Session) -> list[str]:
        if not self._rounds.may_reap(now=self._clock(), database_age=database_age_seconds(session)):
            return []
        taken = moves.reap(session, settings=self._settings)
        taken += chores.reap(session, grace_seconds=self._settings.grace_seconds)
        if taken:
            failpoints.reach("reap_before_commit", self._settings)
        return taken

    def sweep(self) -> None:
        """Ring for work that waits: the bell that should have brought it may be lost."""
        self._alone("cold", cold_jobs.call)
        if anew := self._alone("settled anew", moves.settle_anew):
            log.warning("jobs.settled_anew", ids=anew)
        waiting = self._alone("sweep", lanes.waiting) or set()
        for lane in LANES:
            if lane in waiting:
                ring(lane, self._settings)
        for worker_id, pool_name in (self._alone("called", members.called) or {}).items():
            call(worker_id, self._settings, pool=pool_name)

    def keep_time(self) -> None:
        """Start the jobs of schedules that are due. A process that dies here leaves whole runs and due moments."""
        sessions, started = partial(session_scope, self._engine), False
        for schedule_id in self._alone("due", schedules.due) or ():
            if self._over.is_set():
                break
            run = self._alone("schedules", schedule_runs.prepared(sessions, self._settings, schedule_id))
            if run is not None:
                log.info("schedule.ran", schedule=schedule_id, verdict=run.verdict, job=run.job_id, reason=run.reason)
                started = started or run.job_id is not None
        if started:
            ring("cpu", self._settings)

    def advance_sweeps(self) -> None:
        """A round of every sweep, each in a transaction of its own: compare trials, stop some, start others."""
        lanes: set[Lane] = set()
        for sweep_id in self._alone("sweeps", sweep_rounds.running) or []:
            advance = partial(sweep_rounds.advance, sweep_id=sweep_id, settings=self._settings)
            lanes |= self._alone("sweeps", advance) or set()
        for lane in lanes:
            ring(lane, self._settings)

    def collect(self) -> None:
        """Delete expired files, and objects that no row names and none ever will."""
        self._alone("forget", workers.forget)
        self._alone("preflights", preflights.forget)
        self._alone("deliveries", deliveries.forget)
        self._alone("playgrounds", playgrounds.forget)
        self._alone("schedule runs", schedules.forget)
        self._alone("promotions", approvals.expire)
        self._alone("sign-ins", partial(sign_ins.forget, settings=self._settings))
        self._alone("key secrets", rotation.forget)
        store = open_store(self._settings)
        self._alone("expire", files.expire)
        self._alone("uploads", parted_uploads.expire)
        store.delete(self._alone("deleted", garbage.deleted_file_keys) or [])
        for find in (
            garbage.dead_prefixes,
            garbage.dead_merge_prefixes,
            garbage.dead_export_prefixes,
            garbage.dead_upload_prefixes,
        ):
            for prefix, kept in self._alone("garbage", find) or []:
                self._empty(store, prefix, kept=kept)

    def _empty(self, store: Store, prefix: str, *, kept: frozenset[str]) -> None:
        gone = [key for key in store.keys(prefix) if not any(key.startswith(name) for name in kept)]
        store.delete(gone)
        if gone:
            log.info("garbage.collected", prefix=prefix, objects=len(gone))


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    hide_secrets()
    settings = Settings()
    logs.configure(settings)
    janitor = Janitor(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: janitor.stop())
    log.info("janitor.started")
    janitor.run()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main()
