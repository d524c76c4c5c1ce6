"""What moves a sweep on: one round reads the looks of its jobs, compares, stops, starts and ends, in one transaction.

A round that dies leaves nothing of itself, and rounds of one sweep take turns at its row. So a trial never has two
jobs, whoever is killed when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared import failpoints
from shared.chores import sweep_looks, sweeps
from shared.chores.sweeps import SeenSweep
from shared.contract.documents import error_document
from shared.contract.job_request import CreateJob
from shared.contract.spec import BaseModelRef
from shared.contract.sweep import CreateSweep, Halving, lower_is_better
from shared.errors import Invalid, LimitReached, TunepoolError, Unavailable
from shared.jobs import moves, parents, submission
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.plan import halving
from shared.plan.halving import RungVerdict
from shared.settings import Settings
from shared.settle import sweep_trials
from shared.store.lifecycle import Lane, is_terminal
from shared.store.tables import ApiKeyRow, JobRow, SweepRow, TrialRow
from shared.tenants import keys
from shared.tenants.keys import Caller

OVER: Final = ("succeeded", "failed", "cancelled", "stopped")
WAITING: Final = ("validating_files", "queued", "paused")


def running(session: Session) -> Sequence[str]:
    """Sweeps that a round may move on."""
    return session.scalars(select(SweepRow.id).where(SweepRow.status == "running").order_by(SweepRow.id)).all()


def advance(session: Session, sweep_id: str, *, settings: Settings) -> set[Lane]:
    """One round. Returns the lanes that have new work; nothing is done while another round is at this sweep."""
    row = session.scalars(
        select(SweepRow).where(SweepRow.id == sweep_id, SweepRow.status == "running").with_for_update(skip_locked=True)
    ).one_or_none()
    if row is None:
        return set()
    seen = sweeps.seen(session, row)
    round_ = _Round(session, seen, CreateSweep.model_validate(row.request))
    round_.play()
    failpoints.reach("sweep_before_commit", settings)
    return round_.lanes


@dataclass
class _Round:
    session: Session
    seen: SeenSweep
    wanted: CreateSweep
    lanes: set[Lane] = field(default_factory=set)

    @property
    def row(self) -> SweepRow:
        return self.seen.row

    def play(self) -> None:
        sweep_looks.read(self.session, self.seen, self.wanted)
        self._settle()
        self._close_if_spent()
        if self.row.closed is None:
            self._compare()
            self._start()
        else:
            self._withdraw()
        self._end()

    def _job(self, trial: TrialRow) -> JobRow:
        return self.seen.jobs[trial.job_id or ""]

    def _started(self) -> list[tuple[TrialRow, JobRow]]:
        return [(trial, self._job(trial)) for trial in self.seen.trials if trial.state == "started"]

    def _settle(self) -> None:
        """Take over how the ended jobs of its trials ended."""
        for trial, job in self._started():
            if is_terminal(job.status):  # type: ignore[arg-type]  # text in the row
                ours = job.status == "cancelled" and trial.reason is not None
                trial.state = "stopped" if ours else job.status
                trial.value = sweep_looks.final(trial.looks, job, self.wanted)

    # --- the budget --------------------------------------------------------------------------------------------------

    def _close_if_spent(self) -> None:
        budget, spent = self.wanted.budget_device_seconds, sum(self.seen.seconds.values())
        if budget is not None and spent >= budget and self.row.closed is None:
            self.row.closed = f"The budget of {budget:g} device-seconds is used up: {spent:.1f}"

    def _withdraw(self) -> None:
        """Nothing starts any more. What runs, runs to its end."""
        waiting = [trial for trial, job in self._started() if job.status in WAITING]
        for trial in self.seen.trials:
            if trial.state == "planned":
                trial.state, trial.reason = "stopped", self.row.closed
        for trial in waiting:
            self._stop(trial, self.row.closed or "")

    def _stop(self, trial: TrialRow, why: str) -> None:
        """By the moves that anybody uses; the job's events say why."""
        trial.reason = why
        reason = f"Stopped by sweep {self.row.id}: {why}"
        job_id = trial.job_id or ""
        if moves.cancel_all_waiting(self.session, [job_id], reason=reason):
            trial.state = "stopped"
        else:
            moves.request_cancel_of_running(self.session, [job_id], reason=reason)

    # --- halving -----------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """On each rung that all have come to: the best go on. Who has come before the others waits."""
        strategy = self.wanted.strategy
        if not isinstance(strategy, Halving):
            return
        steps = halving.rung_steps(len(self.seen.trials), strategy.factor, strategy.first_step)
        for rung, step in enumerate(steps):
            here = [trial for trial in self.seen.trials if _stands_on(trial, rung)]
            come = {trial.number: value for trial in here for value in self._values(trial, step)}
            if len(come) < len(here):
                self._park([trial for trial in here if trial.number in come], rung=rung, step=step)
                return
            entered = len(self.seen.trials) // strategy.factor**rung
            ranked = halving.verdicts(
                come, entered=entered, factor=strategy.factor, lower_is_better=lower_is_better(self.wanted.measure)
            )
            for trial in here:
                self._judge(trial, ranked[trial.number], step=step, of=len(here), value=come[trial.number])

    def _values(self, trial: TrialRow, step: int) -> list[float | None]:
        """What it has at that step, in a list; an empty one: it has not come so far."""
        return [] if trial.job_id is None else sweep_looks.at(trial.looks, self._job(trial), step)

    def _park(self, trials: Sequence[TrialRow], *, rung: int, step: int) -> None:
        """Have them wait for the others, paused: they hold no device."""
        for trial in trials:
            if trial.parked == rung or self._job(trial).status not in {"running", "queued"}:
                continue
            try:
                moves.request_pause(self.session, trial.job_id or "", project_id=self.row.project_id)
            except Invalid:
                continue  # it has ended meanwhile
            trial.parked = rung
            words = f"It has come to step {step} and waits there for the other trials of sweep {self.row.id}"
            journal.append(self.session, trial.job_id or "", [NewEvent(words, data={"sweep": self.row.id})])

    def _judge(self, trial: TrialRow, verdict: RungVerdict, *, step: int, of: int, value: float | None) -> None:
        has = "no value" if value is None else f"{self.wanted.measure} {value:.6g}"
        words = f"rank {verdict.rank} of {of} at step {step} ({has})"
        if not verdict.goes_on:
            if trial.state == "succeeded":
                trial.reason = f"{words}; it had ended before"
            else:
                self._stop(trial, words)
            return
        trial.rung += 1
        if trial.state == "started":
            self._tell(trial, f"Sweep {self.row.id}: {words}; it goes on")

    def _tell(self, trial: TrialRow, words: str) -> None:
        """An event of its job, numbered under the lock of the job's row."""
        self.session.execute(select(JobRow.id).where(JobRow.id == trial.job_id).with_for_update())
        journal.append(self.session, trial.job_id or "", [NewEvent(words, data={"sweep": self.row.id})])

    # --- starts ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """As many as may be at work at once: first those that go on from a rung, then new ones."""
        self.row.detail = self._paused_by_hand()
        free = self.wanted.max_parallel - sum(job.status != "paused" for _, job in self._started())
        for trial, job in self._started():
            if trial.reason is not None or trial.parked is None or trial.parked >= trial.rung:
                continue
            if job.status != "paused" and job.pause_requested_at is None:
                trial.parked = None  # somebody has resumed it by hand
            elif job.status == "paused" and free > 0:
                moves.resume(self.session, job.id, project_id=self.row.project_id)
                trial.parked, free = None, free - 1
                self.lanes.add("training")
        for trial in [trial for trial in self.seen.trials if trial.state == "planned"]:
            if free <= 0 or not self._begin(trial):
                break
            free -= trial.state == "started"

    def _paused_by_hand(self) -> str | None:
        """Trials that somebody has paused: no round resumes them, and the sweep does not end before they do."""
        paused = [
            (trial, job)
            for trial, job in self._started()
            if job.status == "paused" and trial.parked is None and trial.reason is None
        ]
        if not paused:
            return None
        trial, job = paused[0]
        others = f" and {len(paused) - 1} others" if len(paused) > 1 else ""
        return (
            f"Trial {trial.number}{others} paused, not by the sweep. It waits until somebody resumes or cancels the "
            f"job: {job.id}"
        )

    def _begin(self, trial: TrialRow) -> bool:
        """Make the job of a trial; False: no further one can be made now."""
        caller = self._caller()
        if caller is None:
            self.row.closed = "The API key that asked for it is revoked or has expired"
            return False
        try:
            with self.session.begin_nested():
                trial.job_id = self._submit(trial, caller)
                trial.state = "started"
        except LimitReached as error:
            self.row.detail = error.message
            return False
        except Unavailable:
            raise
        except TunepoolError as error:
            trial.state, trial.error = "failed", error_document(error.code, error.message, param=error.param)
            return True
        self.lanes.add("cpu")
        return True

    def _submit(self, trial: TrialRow, caller: Caller) -> str:
        """As anybody's job is. Raises what a submit raises."""
        name = self.row.parent_name
        parent = None if name is None else parents.find(self.session, name, project_id=self.row.project_id)
        job = submission.submit(
            self.session,
            CreateJob.model_validate(trial.request),
            caller=caller,
            base=BaseModelRef.model_validate(self.row.base),
            parent=parent,
            request_sha256=hashlib.sha256(json.dumps(trial.request, sort_keys=True).encode()).hexdigest(),
            traceparent=self.row.traceparent,
        ).job
        chosen = ", ".join(sweep_trials.labels(trial.settings))
        words = f"Trial {trial.number} of sweep {self.row.id}: {chosen}"
        journal.append(self.session, job.id, [NewEvent(words, data={"sweep": self.row.id, "trial": trial.number})])
        return job.id

    def _caller(self) -> Caller | None:
        """Whoever asked for the sweep, with what the key may do now."""
        owner = self.session.execute(keys.OWNERS.where(ApiKeyRow.id == self.row.key_id)).one_or_none()
        caller = None if owner is None else keys.caller_of(owner._mapping)
        return caller if caller is not None and caller.may("jobs:write") else None

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        self.session.flush()
        if any(trial.state not in OVER for trial in self.seen.trials):
            return
        best = self._best()
        values: dict[str, Any] = {"status": "succeeded", "best": best}
        if best is None:
            why = f" {self.row.closed}." if self.row.closed else ""
            message = f"None of its {len(self.seen.trials)} trials has succeeded.{why}"
            values = {"status": "failed", "error": error_document("sweep_without_result", message)}
        self.session.execute(
            update(SweepRow)
            .where(SweepRow.id == self.row.id, SweepRow.status == "running")
            .values(finished_at=func.now(), **values)
            .execution_options(synchronize_session=False)
        )
        self.session.refresh(self.row)

    def _best(self) -> int | None:
        """The number of the best trial that has a model."""
        values = {trial.number: trial.value for trial in self.seen.trials if trial.state == "succeeded"}
        ranked = halving.verdicts(values, entered=1, factor=2, lower_is_better=lower_is_better(self.wanted.measure))
        return next((number for number, verdict in ranked.items() if verdict.goes_on), None)


def _stands_on(trial: TrialRow, rung: int) -> bool:
    """Whether the comparison of this rung is about it: it is there or on its way, and nobody has ended it."""
    return trial.rung == rung and trial.reason is None and trial.state in {"planned", "started", "succeeded"}
