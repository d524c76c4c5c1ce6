"""Processes die at any moment; the job does not (faults 1-12, 35-37, 47, 48, 56, 57 of the reliability plan)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import psutil
import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared.store.tables import AdapterRow, DeviceRow
from tests import living
from tests.lifecycle.stack import Stack, chain_of, until
from tests.patience import lease, patience
from worker.program.processes import Tag

# Its first attempt waits at step 30 for whatever is done to it, however long that takes here.
LONG = "steps=60 step_seconds=0.05 save=10 hold=30 once"


@pytest.fixture
def at_work(stack: Stack) -> Iterator[Stack]:
    """A worker (the first of the stack's processes) and a janitor."""
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    yield stack
    assert stack.broken_invariants() == []


def phase(stack: Stack, job_id: str) -> str | None:
    attempts = stack.attempts(job_id)
    return attempts[-1].phase if attempts and attempts[-1].ended_at is None else None


def supervisor(stack: Stack) -> psutil.Process:
    parent: psutil.Process = until(
        lambda: next(filter(None, map(living.parent, stack.trainers())), None), what="a trainer and its supervisor"
    )
    return parent


def must_succeed(stack: Stack, job_id: str, *, steps: int = 60) -> None:
    """The job ends as if nothing had happened: whole chain, one adapter."""
    job = stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert stack.chain(job.manifest) == chain_of(steps)
    with Session(stack.engine) as session:
        assert len(session.scalars(select(AdapterRow).where(AdapterRow.job_id == job_id)).all()) == 1


def test_a_killed_worker_takes_its_trainer_along_and_the_reaper_returns_the_job(at_work: Stack) -> None:
    job_id = at_work.submit(LONG)
    at_work.wait_for_checkpoint(job_id, 10)

    at_work.processes[0].kill()
    at_work.processes[0].wait()
    promised = at_work.job(job_id).lease_until

    until(lambda: at_work.trainers() == [], seconds=5, what="the trainer's death")
    at_work.wait(job_id, "queued", seconds=10)
    assert at_work.attempts(job_id)[0].ended_at >= promised + timedelta(seconds=at_work.settings.grace_seconds)
    at_work.start_worker()
    must_succeed(at_work, job_id)
    assert [row.outcome for row in at_work.attempts(job_id)] == ["lost", "succeeded"]


def test_a_worker_that_comes_back_need_not_wait_for_its_old_leases(stack: Stack) -> None:
    hour = {"TUNEPOOL_LEASE_SECONDS": "3600"}
    worker = stack.start_worker(**hour)
    stack.start_janitor()
    job_id = stack.submit(LONG)
    stack.wait_for_checkpoint(job_id, 10)

    worker.kill()
    worker.wait()
    stack.start_worker(**hour)

    must_succeed(stack, job_id)


def test_a_worker_that_comes_back_takes_no_job_before_it_has_given_up_its_old_leases(at_work: Stack) -> None:
    # Registering ends all its leases: one that it took before would be reaped under a living supervisor.
    job_id = at_work.submit(LONG)
    at_work.wait_for_checkpoint(job_id, 10)
    at_work.processes[0].kill()
    at_work.wait(job_id, "queued", seconds=10)  # its device is free again, and still in the pool
    with at_work.engine.connect() as blocker:
        # A worker on a busy machine may need longer to start than the server lets a transaction rest.
        blocker.execute(text("set local idle_in_transaction_session_timeout = 0"))
        blocker.execute(text("select from workers for no key update"))
        at_work.start_worker()
        until(lambda: (at_work.home / "worker-home.log").read_text().count(" ready.") == 2, what="a second worker")
        time.sleep(2)  # the janitor rings every second

    must_succeed(at_work, job_id)
    assert [row.outcome for row in at_work.attempts(job_id)] == ["lost", "succeeded"]


def test_a_killed_supervisor_takes_its_trainer_along_and_a_sibling_goes_on(at_work: Stack) -> None:
    job_id = at_work.submit(LONG)
    at_work.wait_for_checkpoint(job_id, 10)
    trainer = at_work.trainers()[0]

    supervisor(at_work).kill()

    until(lambda: not living.is_alive(trainer), seconds=5, what="the trainer's death")
    must_succeed(at_work, job_id)


def test_a_killed_trainer_is_started_again_from_its_checkpoint(at_work: Stack) -> None:
    job_id = at_work.submit(LONG)
    at_work.wait_for_checkpoint(job_id, 20)

    at_work.trainers()[0].kill()

    must_succeed(at_work, job_id)
    first, _ = at_work.attempts(job_id)
    assert (first.outcome, first.exit_code, first.error["code"]) == ("crashed", -9, "trainer_killed")


def killed_amid(stack: Stack, moment: str) -> str:
    """A job whose worker was killed at that moment; another one when it had ended before the kill came."""
    worker = stack.processes[0]
    for _ in range(5):
        job_id = stack.submit("steps=3 files=3000", rows=60_000 if moment == "staging" else 12)
        until(
            lambda job_id=job_id: phase(stack, job_id) == moment or stack.job(job_id).status == "succeeded",
            seconds=60,
            what=moment,
            brief=True,
        )
        worker.kill()
        worker.wait()
        if stack.attempts(job_id)[-1].ended_at is None:
            return job_id
        worker = stack.start_worker()
    pytest.fail(f"the machine never killed it amid {moment}")


@pytest.mark.parametrize("moment", ["staging", "publishing"])
def test_a_worker_killed_while_it_moves_files_publishes_nothing_half(at_work: Stack, moment: str) -> None:
    job_id = killed_amid(at_work, moment)
    with Session(at_work.engine) as session:
        assert session.scalars(select(AdapterRow).where(AdapterRow.job_id == job_id)).all() == []
    at_work.start_worker()

    must_succeed(at_work, job_id, steps=3)
    assert [row.outcome for row in at_work.attempts(job_id)] == ["lost", "succeeded"]


def test_a_worker_killed_while_it_reads_a_file_leaves_the_check_to_the_next(at_work: Stack) -> None:
    job_id = at_work.submit("steps=3", rows=120_000)
    time.sleep(0.5)

    at_work.processes[0].kill()
    at_work.processes[0].wait()
    at_work.start_worker()

    must_succeed(at_work, job_id, steps=3)


def test_a_job_that_kills_its_trainer_stops_after_its_attempts_and_harms_no_other(at_work: Stack) -> None:
    poison, good = at_work.submit("kill_self"), at_work.submit("steps=3")

    assert at_work.wait(poison).error["code"] == "trainer_killed"
    assert len(at_work.attempts(poison)) == 3
    must_succeed(at_work, good, steps=3)


def test_a_job_that_kills_its_supervisor_stops_after_its_attempts_too(stack: Stack) -> None:
    at_work = stack
    at_work.start_worker(TUNEPOOL_ISOLATION="off")  # no program may signal its supervisor otherwise
    at_work.start_janitor()
    at_work.wait_for_worker()
    poison = at_work.submit("kill_parent")

    job = at_work.wait(poison, seconds=60)

    assert (job.status, job.error["code"]) == ("failed", "worker_lost")
    assert [row.outcome for row in at_work.attempts(poison)] == ["lost"] * 3
    must_succeed(at_work, at_work.submit("steps=3"), steps=3)


def test_a_frozen_supervisor_that_wakes_later_writes_nothing(at_work: Stack) -> None:
    job_id = at_work.submit(LONG)
    at_work.wait_for_checkpoint(job_id, 10)
    frozen, old_trainer = supervisor(at_work), at_work.trainers()[0]

    frozen.suspend()
    until(lambda: len(at_work.attempts(job_id)) == 2, seconds=20, what="a second attempt")
    until(lambda: (at_work.job(job_id).progress or {}).get("step", 0) > 30, what="a step that the first has not made")
    assert not living.is_alive(old_trainer), "two trainers on one device"  # its parent is frozen
    frozen.resume()

    must_succeed(at_work, job_id)
    assert [row.outcome for row in at_work.attempts(job_id)] == ["lost", "succeeded"]
    assert at_work.job(job_id).manifest["prefix"].endswith(f"a{at_work.job(job_id).fence:06d}/adapter")


def test_a_frozen_trainer_is_ended_and_started_again(stack: Stack) -> None:
    stack.start_worker(TUNEPOOL_STALL_FLOOR_SECONDS=lease(3))
    job_id = stack.submit(LONG)
    stack.wait_for_checkpoint(job_id, 10)

    stack.trainers()[0].suspend()

    must_succeed(stack, job_id)
    assert stack.attempts(job_id)[0].error["code"] == "trainer_stalled"


def test_orphans_of_this_home_are_killed_before_the_first_claim_and_neighbours_are_not(stack: Stack) -> None:
    home = str(stack.settings.home.resolve())
    me = psutil.Process()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    orphan, neighbour = (
        subprocess.Popen(["sleep", "60"], env={"TUNEPOOL_ATTEMPT": str(Tag(home, "ftjob-x", 1, pid, started))})
        for pid, started in ((gone.pid, 1.0), (me.pid, me.create_time()))
    )
    try:
        stack.start_worker()
        stack.wait_for_worker()

        assert orphan.wait(patience(5)) == -signal.SIGKILL
        assert neighbour.poll() is None
    finally:
        neighbour.kill()
        neighbour.wait()


def test_two_workers_cannot_share_a_home(stack: Stack) -> None:
    stack.start_worker()
    stack.wait_for_worker()

    second = stack.start_worker()

    assert second.wait(patience(30)) != 0
    assert "already runs" in (stack.home / "worker-home.log").read_text()


# --- drain -----------------------------------------------------------------------------------------------------------


def test_sigterm_checkpoints_requeues_uncounted_and_ends_the_worker(at_work: Stack) -> None:
    job_id = at_work.submit("steps=60 step_seconds=0.05 save=1000 hold=30 once")
    at_work.wait_for_step(job_id, 5)
    worker = at_work.processes[0]

    worker.terminate()

    assert worker.wait(patience(15)) == 0
    job = at_work.job(job_id)
    assert (job.status, job.failures) == ("queued", 0)
    assert job.last_checkpoint["step"] >= 5
    with Session(at_work.engine) as session:
        assert session.scalars(select(DeviceRow)).all() == [], "a worker that left takes its devices along"
    at_work.start_worker()
    must_succeed(at_work, job_id)
    assert [row.outcome for row in at_work.attempts(job_id)] == ["drained", "succeeded"]


def test_sigterm_to_every_process_of_the_worker_twice_is_one_drain(at_work: Stack) -> None:
    job_id = at_work.submit("steps=60 step_seconds=0.05 save=1000 hold=30 once")
    at_work.wait_for_step(job_id, 5)
    worker = at_work.processes[0]
    trainers = {process.pid for process in at_work.trainers()}
    family = [child for child in living.family(worker.pid) if child.pid not in trainers]

    for _ in range(2):
        for pid in [*(process.pid for process in family), worker.pid]:
            with suppress(ProcessLookupError):  # an idle child ends at the first, and may be reaped before the second
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)

    assert worker.wait(patience(15)) == 0
    assert [row.outcome for row in at_work.attempts(job_id)] == ["drained"]
    at_work.start_worker()
    must_succeed(at_work, job_id)


def test_a_worker_killed_in_its_drain_loses_no_more_than_a_checkpoint(at_work: Stack) -> None:
    job_id = at_work.submit(LONG + " ignore_stop ignore_term")
    at_work.wait_for_checkpoint(job_id, 10)

    at_work.processes[0].terminate()
    time.sleep(0.5)
    at_work.processes[0].kill()
    at_work.processes[0].wait()

    at_work.start_worker()
    must_succeed(at_work, job_id)
