"""Gives admitted attempts to a cluster: `python -m worker.attempt.dispatcher`.

The plan counts places in the cluster as devices of this worker, and gives them as it gives all devices. An admitted
job is submitted under the attempt's name. The dispatcher watches it until the process that the cluster starts takes
the lease over. Postgres is the truth: no attempt runs twice, whether the cluster forgets a submission, doubles it or
does not answer.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session

from shared import log as logs
from shared.chores import waiting as lanes
from shared.jobs import cluster_attempts, moves
from shared.jobs.cluster_attempts import Submitted
from shared.lease.values import Claim, Orders, WrittenByNewerVersion
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from shared.store.lifecycle import AttemptOutcome
from worker.attempt.cluster_places import ClusterPresence
from worker.attempt.engines import ClusterJobRequest, ClusterJobState, Engine, EngineAway, EngineRefused, EngineUnusable
from worker.attempt.slurm import Slurm
from worker.host.host import AWAY, beside
from worker.host.presence import HomeAlreadyServed, take_home

log = structlog.get_logger()
T = TypeVar("T")


def kubernetes(settings: Settings) -> Engine:
    """The engine of TUNEPOOL_LAUNCHER=kubernetes. Raises EngineUnusable."""
    try:
        # Its client is an extra: imported only where it is asked for.
        from worker.attempt.kubernetes import Kubernetes
    except ModuleNotFoundError as error:
        remedy = "pip install 'tunepool-server[kubernetes]'"
        raise EngineUnusable(f"The official client of Kubernetes is not installed ({error}): {remedy}.") from error
    return Kubernetes(settings)


ENGINES: Final[dict[str, Callable[[Settings], Engine]]] = {"slurm": Slurm, "kubernetes": kubernetes}
# Looks in a row that must miss a job before its cluster is believed to have forgotten it.
MISSES: Final = 3
# After an attempt's end its process tidies up; one that still runs so long afterwards is ended.
TIDY_SECONDS: Final = 60.0
PREEMPTED: Final = "The job gave its place in the cluster to another one before it had started."


@dataclass
class _Watch:
    """What this process remembers of an attempt between two looks. Losing it costs a question."""

    unsure: bool = True  # it may have been submitted, by an earlier dispatcher or without an answer
    missed: int = 0
    missed_since: float | None = None
    refused_since: float | None = None
    begun_at: float | None = None


class Dispatcher:
    """One loop: look at the cluster, tend what is there, admit what fits."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        standing: ClusterPresence,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._cluster = engine
        self._standing = standing
        self._clock = clock
        self._database: Database = make_engine(settings.database_url, pool_size=1, max_overflow=1)
        self._watches: dict[str, _Watch] = {}
        self._passed_over: set[str] = set()  # rows of a newer version
        self._over = threading.Event()

    def stop(self) -> None:
        """End after the look at hand; safe in a signal handler. What is submitted stays so."""
        self._over.set()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except AWAY as error:
                log.warning("dispatcher.unheard", error=str(error)[:200])
            self._over.wait(self._settings.cluster_look_seconds)

    def close(self) -> None:
        """Let go of the database."""
        self._database.dispose()

    def look(self) -> None:
        """One pass. Raises one of `AWAY`."""
        if not self._standing.registered:
            return
        try:
            sights = self._cluster.listed()
        except EngineAway as error:
            self._unheard(str(error))
            return
        ours = defaultdict[str, list[ClusterJobState]](list)
        for sight in sights:
            ours[sight.name].append(sight)
        submitted = self._submitted()
        self._watches = {each.name: self._watches.get(each.name) or _Watch() for each in submitted}
        for attempt in submitted:
            self._attend(attempt, ours[attempt.name])
        self._tidy(sights)
        self._admit()

    # --- what is submitted ------------------------------------------------------------------------------------------

    def _submitted(self) -> list[Submitted]:
        return self._write(lambda s: cluster_attempts.submitted(s, self._standing.worker.id))

    def _unheard(self, why: str) -> None:
        """The cluster is away: orders are obeyed all the same, and everybody hears why nothing moves."""
        log.warning("cluster.unheard", engine=self._cluster.label, error=why)
        for attempt in self._submitted():
            if not self._obeyed(attempt):
                self._tell(attempt, f"{self._cluster.label} does not answer and is asked again: {why}")

    def _attend(self, attempt: Submitted, sights: Sequence[ClusterJobState]) -> None:
        watch = self._watches[attempt.name]
        if self._obeyed(attempt):
            return  # what waits there is tidied by this same look
        if sights:
            watch.missed, watch.missed_since = 0, None
            self._watch_start(attempt, sights, watch)
        elif attempt.noted.get("id") or watch.unsure:
            self._look_for(attempt, watch)
        else:
            self._submit(attempt, watch)

    def _obeyed(self, attempt: Submitted) -> bool:
        """Whether somebody wants the attempt to end, and it has. Nothing of it runs: there is nothing to wait for."""
        lease, orders = attempt.lease, attempt.orders

        def end(session: Session) -> object:
            if not moves.never_began(session, lease):
                return None  # handed over meanwhile: its own process obeys
            if orders.cancel:
                return moves.confirm_cancelled(session, lease)
            if orders.pause:
                return moves.confirm_paused(session, lease)
            given_back = partial(moves.give_back, session, lease, settings=self._settings)
            return given_back(outcome="preempted", code="preempted", message=PREEMPTED)

        if not (orders.cancel or orders.pause or orders.preempt):
            return False
        self._write(end)
        return True

    def _watch_start(self, attempt: Submitted, sights: Sequence[ClusterJobState], watch: _Watch) -> None:
        """It is there. Of several with that name the first that runs stays, else the first; the rest that wait go."""
        kept = next((sight for sight in sights if not sight.waits), sights[0])
        self._withdraw([sight for sight in sights if sight.waits and sight is not kept])
        watch.begun_at = None if kept.waits else (watch.begun_at or self._clock())
        label = self._cluster.label
        if watch.begun_at is not None and self._clock() - watch.begun_at > self._settings.cluster_start_seconds:
            limit = self._settings.cluster_start_seconds
            message = f"{label}: {kept.words}, and its worker has not reported within {limit:.0f} s."
            if self._end(attempt, message, "crashed"):
                self._withdraw(sights)
        elif kept.waits:
            self._tell(attempt, f"{label}: {kept.words}", kept.id)
        else:
            self._tell(attempt, f"{label}: {kept.words}; its worker starts", kept.id)

    def _look_for(self, attempt: Submitted, watch: _Watch) -> None:
        """It is not there, and may have been. The cluster's own books say what became of it."""
        try:
            fate = self._cluster.fate(attempt.name)
        except EngineAway as error:
            self._tell(attempt, f"{self._cluster.label} does not answer and is asked again: {error}")
            return
        label = self._cluster.label
        if fate.kind == "taken":
            self._end(attempt, f"{label} took the machine back before the job had started: {fate.words}.", "preempted")
        elif fate.kind == "ended":
            self._end(attempt, f"{label} ended the attempt before its worker reported: {fate.words}.", "crashed")
        elif fate.kind == "unknown" and not attempt.noted.get("id"):
            watch.unsure = False  # nobody ever took it
            self._submit(attempt, watch)
        else:
            self._missed(attempt, watch, fate.words, alive=fate.kind == "alive")

    def _missed(self, attempt: Submitted, watch: _Watch, words: str, *, alive: bool) -> None:
        watch.missed += 1
        watch.missed_since = self._clock() if watch.missed_since is None else watch.missed_since
        label, number = self._cluster.label, attempt.noted.get("id", "")
        waited = self._clock() - watch.missed_since
        if waited > self._settings.cluster_start_seconds if alive else watch.missed >= MISSES:
            self._end(attempt, f"{label} no longer knows the attempt: {words}.", "crashed", code="cluster_forgot")
        else:
            self._tell(attempt, f"{label} does not list job {number} and is asked again: {words}")

    def _submit(self, attempt: Submitted, watch: _Watch) -> None:
        label = self._cluster.label
        try:
            number = self._cluster.submit(ClusterJobRequest(attempt.name, attempt.devices))
        except EngineAway as error:
            watch.unsure = True
            self._tell(attempt, f"{label} does not answer and is asked again: {error}")
        except EngineRefused as error:
            self._refused(attempt, watch, str(error))
        else:
            watch.refused_since = None
            log.info("attempt.submitted", attempt=attempt.name, engine=label, id=number)
            self._tell(attempt, f"{label}: job {number} is submitted", number)

    def _refused(self, attempt: Submitted, watch: _Watch, words: str) -> None:
        """Refusals are a limit that passes, or a setting that an operator mends: asked again for a while."""
        log.warning("cluster.refused", attempt=attempt.name, words=words)
        watch.refused_since = self._clock() if watch.refused_since is None else watch.refused_since
        if self._clock() - watch.refused_since > self._settings.cluster_start_seconds:
            self._end(attempt, f"{self._cluster.label} refuses the job: {words}", "crashed", code="cluster_refused")
        else:
            self._tell(attempt, f"{self._cluster.label} refuses it and is asked again: {words}")

    def _tell(self, attempt: Submitted, words: str, number: str | None = None) -> None:
        """Note what there is to say, if it is news."""
        noted = {"engine": self._cluster.label, "id": number or attempt.noted.get("id"), "words": words}
        if noted != attempt.noted:
            self._write(lambda s: cluster_attempts.tell(s, attempt.lease, noted))

    def _end(
        self, attempt: Submitted, message: str, outcome: AttemptOutcome, *, code: str = "cluster_start_failed"
    ) -> bool:
        """Give the job back. False: the attempt was handed over or ended meanwhile, and nothing is written."""
        named = "preempted" if outcome == "preempted" else code

        def end(session: Session) -> bool:
            given_back = partial(moves.give_back, session, attempt.lease, settings=self._settings)
            began = not moves.never_began(session, attempt.lease)
            return not began and given_back(outcome=outcome, code=named, message=message) is not None

        ended = self._write(end)
        log.warning("attempt.not_started", attempt=attempt.name, message=message, ended=ended)
        return ended

    # --- what is there without a reason -----------------------------------------------------------------------------

    def _tidy(self, sights: Sequence[ClusterJobState]) -> None:
        """Take back what has ended here: cancelled, given back, or its process hangs."""
        ended = self._write(lambda s: cluster_attempts.seconds_since_end(s, {sight.name for sight in sights}))
        late = TIDY_SECONDS + self._settings.stop_seconds
        self._withdraw([sight for sight in sights if sight.name in ended and (sight.waits or ended[sight.name] > late)])

    def _withdraw(self, sights: Sequence[ClusterJobState]) -> None:
        for sight in sights:
            try:
                self._cluster.withdraw(sight)
            except EngineAway as error:
                log.warning("cluster.unheard", engine=self._cluster.label, error=str(error))
                return  # the next look tries again: what has ended is tidied

    # --- what is admitted -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Lease what the plan gives us and submit it, until there is nothing, or the cluster does not take it."""
        while not self._over.is_set():
            if "training" not in self._write(lanes.waiting):
                return
            claim = self._claim()
            if claim is None:
                return
            attempt = Submitted(claim.lease, len(claim.device_ids), Orders(), {})
            self._watches[attempt.name] = watch = _Watch(unsure=False)
            self._submit(attempt, watch)
            if watch.unsure:
                return

    def _claim(self) -> Claim | None:
        while True:
            try:
                return self._write(self._leased)
            except WrittenByNewerVersion as error:
                self._passed_over.add(error.row_id)
                log.warning("job.not_understood", job_id=error.row_id, remedy="start a dispatcher of a newer version")

    def _leased(self, session: Session) -> Claim | None:
        claim = moves.claim_training(
            session,
            worker_id=self._standing.worker.id,
            pool_name=self._settings.pool,
            lease_seconds=self._settings.lease_seconds,
            passed_over=self._passed_over,
        )
        if claim is not None:
            moves.submit(session, claim)
        return claim

    def _write(self, verb: Callable[[Session], T]) -> T:
        with session_scope(self._database) as session:
            return verb(session)


def main() -> int:
    """Run until SIGTERM or SIGINT."""
    hide_secrets()
    settings = Settings()
    logs.configure(settings)
    if settings.launcher not in ENGINES or settings.cluster_device_bytes is None:
        log.error(
            "dispatcher.refused",
            reason=f"Set TUNEPOOL_LAUNCHER to {' or '.join(ENGINES)} and TUNEPOOL_CLUSTER_DEVICE_BYTES.",
        )
        return 2
    own = beside(settings, "dispatcher")
    try:
        engine = ENGINES[settings.launcher](own)
        lock = take_home(own.home)
    except (HomeAlreadyServed, EngineUnusable) as error:
        log.error("dispatcher.refused", reason=str(error))
        return 1
    standing = ClusterPresence(own)
    dispatcher = Dispatcher(own, engine, standing)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: dispatcher.stop())
    standing.start()
    log.info("dispatcher.started", engine=settings.launcher, worker_id=standing.worker.id)
    dispatcher.run()
    dispatcher.close()
    standing.stop()
    lock.close()
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
