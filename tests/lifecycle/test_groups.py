"""Jobs that the pool trains together: they share a device and a process, and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from shared.jobs import moves
from shared.operating import administration
from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.locks import one_at_a_time
from shared.store.tables import AttemptRow, DeviceRow, JobRow, PoolRow, WorkerRow
from tests import living
from tests.factories import make_caller
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until

LONG = "steps=60 step_seconds=0.05 save=1000 hold=30 once"


@pytest.fixture
def grouping(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    """A worker that lets jobs share its device, in a pool that is held."""
    with open_stack(tmp_path, servers, TUNEPOOL_COTRAINING="project") as made:
        with session_scope(made.engine) as session:
            session.add(PoolRow(name=made.settings.pool, held=True, min_runtime_seconds=0.0))
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made
        broken = made.broken_invariants()
    assert broken == []
    assert made.survivors() == [], "a trainer outlived its worker"


def line_up(stack: Stack, *behaviours: str, **tunepool: object) -> list[str]:
    """Jobs that wait, each with a short forecast. What the pool has not seen yet it forecasts for nobody."""
    jobs = [stack.submit(behaviour, **tunepool) for behaviour in behaviours]
    for job_id in jobs:
        stack.wait(job_id, "queued")
    with session_scope(stack.engine) as session:
        session.execute(update(JobRow).where(JobRow.id.in_(jobs)).values(expected_seconds=60.0))
    return jobs


def release(stack: Stack) -> None:
    with session_scope(stack.engine) as session:
        one_at_a_time(session, f"plan:{stack.settings.pool}")  # no plan under way has half of what is written here
        session.execute(update(PoolRow).values(held=False))
    ring("training", stack.settings)


def outcomes(stack: Stack, job_id: str) -> list[tuple[str | None, int | None]]:
    """Of each attempt: how it ended, and how many jobs shared its device."""
    return [(attempt.outcome, attempt.together) for attempt in stack.attempts(job_id)]


def told(stack: Stack, job_id: str) -> list[str]:
    return [event.message for event in stack.events(job_id)]


def holder(stack: Stack) -> str | None:
    with session_scope(stack.engine) as session:
        return session.scalars(select(DeviceRow.leased_by)).one()


def test_jobs_that_wait_share_the_device_and_each_gets_what_it_gets_alone(grouping: Stack) -> None:
    jobs = line_up(grouping, "steps=10 save=5", "steps=20 save=5", "steps=30 save=5")

    release(grouping)
    ended = [grouping.wait(job_id, seconds=60) for job_id in jobs]

    assert [job.status for job in ended] == ["succeeded"] * 3, [job.error for job in ended]
    assert [grouping.chain(job.manifest) for job in ended] == [chain_of(steps) for steps in (10, 20, 30)]
    assert [outcomes(grouping, job_id) for job_id in jobs] == [[("succeeded", 3)]] * 3
    attempts = [grouping.attempts(job_id)[0] for job_id in jobs]
    assert len({tuple(attempt.device_ids) for attempt in attempts}) == 1
    assert len({attempt.fence for attempt in attempts}) == 1  # each its own, and each its first
    for job_id in jobs:
        assert f"Trains together with 2 others on {attempts[0].device_ids[0]}" in told(grouping, job_id)
        assert next(event.data["step"] for event in grouping.events(job_id) if event.type == "metrics") == 1
    for job, attempt in zip(ended, attempts, strict=True):
        assert 0 < attempt.device_share < 1
        held = (attempt.ended_at - attempt.started_at).total_seconds()
        assert job.device_seconds == pytest.approx(held * attempt.device_share)
    assert ended[0].device_seconds < ended[2].device_seconds
    assert holder(grouping) is None


def lines_of(log: Path, event: str) -> str:
    """The log's lines about an event: evaluations have programs that wait as well."""
    return "\n".join(line for line in log.read_text().splitlines() if event in line)


def test_a_trainer_that_was_started_ahead_makes_way_for_a_group(servers: Servers, tmp_path: Path) -> None:
    ahead = {"TUNEPOOL_KEEP_WARM": "imports", "TUNEPOOL_EVALUATOR": "tests.fake_evaluator"}
    with open_stack(tmp_path, servers, TUNEPOOL_COTRAINING="project", **ahead) as stack:
        with session_scope(stack.engine) as session:
            session.add(PoolRow(name=stack.settings.pool, held=True))
        stack.start_worker()
        stack.start_janitor()
        stack.wait_for_worker()
        log = stack.home / "worker-home.log"
        until(lambda: "a job on" in lines_of(log, "spare.ready"), what="a trainer that waits")
        jobs = line_up(stack, "steps=5", "steps=5")

        release(stack)

        assert [stack.wait(job_id, seconds=60).status for job_id in jobs] == ["succeeded"] * 2
        assert [outcomes(stack, job_id) for job_id in jobs] == [[("succeeded", 2)]] * 2
        until(lambda: "trains together with others" in lines_of(log, "spare.not_used"), what="why it was not used")
        alone = stack.submit("steps=5")
        assert stack.wait(alone).status == "succeeded"
        assert stack.broken_invariants() == []
    assert stack.survivors() == []


def test_without_the_setting_each_has_the_device_for_itself(stack: Stack) -> None:
    with session_scope(stack.engine) as session:
        session.add(PoolRow(name=stack.settings.pool, held=True))
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    jobs = line_up(stack, "steps=3", "steps=3")

    release(stack)

    assert [stack.wait(job_id).status for job_id in jobs] == ["succeeded"] * 2
    assert [outcomes(stack, job_id) for job_id in jobs] == [[("succeeded", None)]] * 2
    assert stack.broken_invariants() == []


def test_a_member_that_is_cancelled_fails_or_crashes_leaves_the_others_unharmed(grouping: Stack) -> None:
    leading, faulty, crashing, steady = line_up(grouping, LONG, "user_fault", "steps=12 save=4 crash=6 once", LONG)

    release(grouping)
    grouping.wait_for_step(leading, 5)
    grouping.cancel(leading)
    cancelled, failed = grouping.wait(leading), grouping.wait(faulty)
    until(lambda: grouping.attempts(crashing)[0].ended_at, what="the crash")
    kept = holder(grouping)
    grouping.let_go_on(steady)

    assert cancelled.status == "cancelled"
    assert (failed.status, failed.error["code"]) == ("failed", "data_error")
    assert kept == steady  # the device names whoever is left
    assert grouping.wait(steady).status == "succeeded"
    assert outcomes(grouping, steady) == [("succeeded", 4)]
    again = grouping.wait(crashing, seconds=60)
    assert again.status == "succeeded", again.error
    assert outcomes(grouping, crashing) == [("crashed", 4), ("succeeded", None)]
    assert grouping.chain(again.manifest) == chain_of(12)


def test_a_member_that_cannot_be_stopped_ends_the_program_and_the_others_go_on_alone(grouping: Stack) -> None:
    stubborn, steady = line_up(grouping, "steps=10000 step_seconds=0.05 save=1000 ignore_stop", LONG)

    release(grouping)
    for job_id in (stubborn, steady):
        grouping.wait_for_step(job_id, 5)
    grouping.cancel(stubborn)

    assert grouping.wait(stubborn, seconds=90).status == "cancelled"
    # What is queued again may run a tenth of a second later: no look is sure to see it wait.
    until(lambda: grouping.attempts(steady)[0].ended_at, seconds=90, what="the end of the attempt in the program")
    assert grouping.job(steady).cotraining_ground is None
    until(lambda: grouping.let_go_on(steady) or grouping.job(steady).status == "succeeded", seconds=90)
    assert outcomes(grouping, steady) == [("crashed", 2), ("succeeded", None)]
    assert "The program that the job trained in was ended, because another job in it was stuck." in told(
        grouping, steady
    )


def test_a_member_that_is_paused_goes_on_later_and_the_others_go_on_at_once(grouping: Stack) -> None:
    first, second = line_up(grouping, LONG, LONG)

    release(grouping)
    grouping.wait_for_step(second, 5)
    with session_scope(grouping.engine) as session:
        moves.request_pause(session, second, project_id=grouping.caller.project_id)
    grouping.wait(second, "paused")
    grouping.let_go_on(first)

    assert grouping.wait(first).status == "succeeded"
    with session_scope(grouping.engine) as session:
        moves.resume(session, second, project_id=grouping.caller.project_id)
    ring("training", grouping.settings)
    resumed = grouping.wait(second, seconds=60)
    assert resumed.status == "succeeded"
    assert grouping.chain(resumed.manifest) == chain_of(60)


def test_a_program_that_is_killed_ends_all_its_attempts_and_each_is_tried_again_alone(grouping: Stack) -> None:
    jobs = line_up(grouping, *["steps=20 save=5 hold=12 once"] * 3)

    release(grouping)
    for job_id in jobs:
        grouping.wait_for_checkpoint(job_id, 10)
    (program,) = [process for process in grouping.trainers() if "tests.fake_cotrainer" in living.words(process)]
    os.kill(program.pid, signal.SIGKILL)
    ended = [grouping.wait(job_id, seconds=90) for job_id in jobs]

    assert [job.status for job in ended] == ["succeeded"] * 3, [job.error for job in ended]
    assert [outcomes(grouping, job_id) for job_id in jobs] == [[("crashed", 3), ("succeeded", None)]] * 3
    assert {grouping.chain(job.manifest) for job in ended} == {chain_of(20)}
    assert all("Resuming from the checkpoint of step 10" in told(grouping, job_id) for job_id in jobs)


def test_a_killed_worker_loses_all_and_each_is_tried_again_alone(grouping: Stack) -> None:
    jobs = line_up(grouping, *["steps=20 save=5 hold=12 once"] * 2)

    release(grouping)
    for job_id in jobs:
        grouping.wait_for_checkpoint(job_id, 10)
    worker = grouping.processes[0]
    worker.kill()
    worker.wait()
    grouping.start_worker()
    ended = [grouping.wait(job_id, seconds=120) for job_id in jobs]

    assert [job.status for job in ended] == ["succeeded"] * 2, [job.error for job in ended]
    assert [outcomes(grouping, job_id) for job_id in jobs] == [[("lost", 2), ("succeeded", None)]] * 2
    assert {grouping.chain(job.manifest) for job in ended} == {chain_of(20)}


def test_out_of_memory_together_is_no_fault_of_anybodys_and_all_go_on_alone(grouping: Stack) -> None:
    training = {"per_device_train_batch_size": 2, "batch_size": 2, "packing": False}
    jobs = line_up(grouping, LONG.replace("hold=30 once", ""), "steps=4 fits=1", training=training)

    release(grouping)
    ended = [grouping.wait(job_id, seconds=90) for job_id in jobs]

    assert [job.status for job in ended] == ["succeeded"] * 2, [job.error for job in ended]
    assert [job.failures for job in ended] == [0, 0]
    assert outcomes(grouping, jobs[0]) == [("out_of_memory", 2), ("succeeded", None)]
    # Alone it is out of memory again, and only now it takes fewer rows.
    assert outcomes(grouping, jobs[1]) == [("out_of_memory", 2), ("out_of_memory", None), ("succeeded", None)]
    assert grouping.chain(ended[0].manifest) == chain_of(60)


def test_a_higher_tier_stops_the_group_whole(grouping: Stack) -> None:
    jobs = line_up(grouping, LONG, LONG, queue={"tier": "best_effort"})

    release(grouping)
    for job_id in jobs:
        grouping.wait_for_step(job_id, 3)
    urgent = grouping.submit("steps=5", queue={"tier": "interactive"})

    assert grouping.wait(urgent, seconds=60).status == "succeeded"
    ended = [grouping.wait(job_id, seconds=90) for job_id in jobs]
    assert {grouping.chain(job.manifest) for job in ended} == {chain_of(60)}
    stopped = [grouping.attempts(job_id)[0] for job_id in jobs]
    assert [attempt.outcome for attempt in stopped] == ["preempted"] * 2
    (ran,) = grouping.attempts(urgent)
    assert max(attempt.ended_at for attempt in stopped) <= ran.started_at
    for job_id in jobs:
        assert [event.data for event in grouping.events(job_id) if event.data and "preempted_for" in event.data] == [
            {"preempted_for": urgent}
        ]


def test_a_drained_worker_gives_every_member_back_from_a_checkpoint(grouping: Stack) -> None:
    jobs = line_up(grouping, LONG, LONG)

    release(grouping)
    for job_id in jobs:
        grouping.wait_for_step(job_id, 3)
    with session_scope(grouping.engine) as session:
        operator = make_caller(session, scopes=("admin",))
        worker_id = session.scalars(select(WorkerRow.id)).one()
        administration.set_draining(session, operator, worker_id, draining=True)
    waiting = [grouping.wait(job_id, "queued") for job_id in jobs]
    with session_scope(grouping.engine) as session:
        administration.set_draining(session, operator, worker_id, draining=False)
        open_attempts = session.scalars(select(AttemptRow).where(AttemptRow.ended_at.is_(None))).all()

    assert all(job.last_checkpoint["step"] >= 3 for job in waiting)
    assert open_attempts == []
    assert [grouping.wait(job_id, seconds=60).status for job_id in jobs] == ["succeeded"] * 2
    assert [outcomes(grouping, job_id)[0] for job_id in jobs] == [("drained", 2)] * 2
