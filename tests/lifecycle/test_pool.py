"""The pool's orders as running jobs feel them: preempted, drained, out of time; each goes on to the same result."""

from __future__ import annotations

import time

from sqlalchemy import select

from shared.jobs import moves
from shared.operating import administration
from shared.store.db import session_scope
from shared.store.tables import EventRow, PoolRow, WorkerRow
from tests.factories import make_caller
from tests.lifecycle.stack import Stack, chain_of
from tests.patience import patience


def outcomes(stack: Stack, job_id: str) -> list[str | None]:
    return [attempt.outcome for attempt in stack.attempts(job_id)]


def test_a_higher_tier_stops_a_job_which_checkpoints_waits_and_ends_with_the_same_result(stack: Stack) -> None:
    with session_scope(stack.engine) as session:
        session.add(PoolRow(name=stack.settings.pool, min_runtime_seconds=0.0))
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    victim = stack.submit("steps=60 step_seconds=0.05 save=1000 hold=30 once", queue={"tier": "best_effort"})
    stack.wait_for_step(victim, 3)

    urgent = stack.submit("steps=5", queue={"tier": "interactive"})
    assert stack.wait(urgent).status == "succeeded"
    resumed = stack.wait(victim, seconds=60)

    assert resumed.status == "succeeded", resumed.error
    assert stack.chain(resumed.manifest) == chain_of(60)
    assert outcomes(stack, victim) == ["preempted", "succeeded"]  # once, and it stopped nobody in return
    assert outcomes(stack, urgent) == ["succeeded"]
    assert resumed.failures == 0
    stopped, ran = stack.attempts(victim)[0], stack.attempts(urgent)[0]
    assert stopped.ended_at <= ran.started_at
    told = [event.data for event in stack.events(victim) if event.data and "preempted_for" in event.data]
    assert told == [{"preempted_for": urgent}]
    assert any(event.data == {"preempts": victim} for event in stack.events(urgent))
    assert stack.broken_invariants() == []


def test_a_drained_worker_gives_its_job_back_from_a_checkpoint_and_takes_it_again_once_undrained(stack: Stack) -> None:
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    job_id = stack.submit("steps=60 step_seconds=0.05 save=1000 hold=30 once")
    stack.wait_for_step(job_id, 3)
    with session_scope(stack.engine) as session:
        operator = make_caller(session, scopes=("admin",))
        worker_id = session.scalars(select(WorkerRow.id)).one()
        administration.set_draining(session, operator, worker_id, draining=True)

    waiting = stack.wait(job_id, "queued")
    stopped_at = waiting.last_checkpoint["step"]
    time.sleep(3)  # several sweeps ring meanwhile
    still = stack.job(job_id).status
    with session_scope(stack.engine) as session:
        administration.set_draining(session, operator, worker_id, draining=False)
    job = stack.wait(job_id)

    assert still == "queued"
    assert 3 <= stopped_at < 60
    assert job.status == "succeeded", job.error
    assert stack.chain(job.manifest) == chain_of(60)
    assert outcomes(stack, job_id) == ["drained", "succeeded"]


def test_a_job_out_of_time_checkpoints_and_pauses_and_goes_on_when_it_is_resumed(stack: Stack) -> None:
    job_id = stack.submit("steps=80 step_seconds=0.05 save=1000", queue={"max_runtime_seconds": 60})

    hasty_attempt(stack, speed=30.0)
    paused = stack.job(job_id)
    with session_scope(stack.engine) as session:
        said = session.scalars(
            select(EventRow.message).where(EventRow.job_id == job_id, EventRow.level == "warn")
        ).all()
        moves.resume(session, job_id, project_id=stack.caller.project_id)
    hasty_attempt(stack, speed=1.0)
    job = stack.job(job_id)

    assert (paused.status, paused.failures) == ("paused", 0)
    assert 0 < paused.last_checkpoint["step"] < 80
    assert said == ["max_runtime_seconds (60) is used up; resume the job to go on"]
    assert job.status == "succeeded", job.error
    assert stack.chain(job.manifest) == chain_of(80)
    assert outcomes(stack, job_id) == ["paused", "succeeded"]


def hasty_attempt(stack: Stack, *, speed: float) -> None:
    """The next attempt, supervised by a clock that runs `speed` times too fast; so do the other waits, hence longer."""
    patient = {"TUNEPOOL_STOP_SECONDS": "300", "TUNEPOOL_STALL_FLOOR_SECONDS": "3600"}
    place = {"TUNEPOOL_MODELS_FILE": str(stack.home / "models.toml")}
    worker = stack.start(["-m", "tests.hasty_worker", str(speed)], name="hasty", **patient, **place)
    assert worker.wait(patience(60)) == 0, (stack.home / "hasty.log").read_text()[-3000:]
