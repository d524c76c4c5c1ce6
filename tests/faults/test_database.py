"""Postgres restarts, drops connections, or is away: training goes on, publishing waits (faults 20-24, 29)."""

from __future__ import annotations

import os
import signal
import time

import pytest

from standalone.postgres import EmbeddedPostgres
from tests.faults.conftest import postgres_admin
from tests.lifecycle.stack import Stack, chain_of

LONG = "steps=60 step_seconds=0.05 save=10"


def stop(postgres: EmbeddedPostgres, number: signal.Signals) -> None:
    assert postgres.pid is not None
    os.kill(postgres.pid, number)
    os.waitpid(postgres.pid, 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_a_restart_of_postgres_requeues_nothing_and_training_goes_on(own_stack: Stack, how: signal.Signals) -> None:
    own_stack.start_worker()
    own_stack.start_janitor()
    job_id = own_stack.submit(LONG)
    own_stack.wait_for_step(job_id, 5)
    trainer = own_stack.trainers()[0]

    stop(own_stack.servers.postgres, how)
    time.sleep(5)  # longer than the lease
    assert not trainer.is_running() or trainer == own_stack.trainers()[0]
    own_stack.servers.postgres.start()
    own_stack.engine.dispose()

    job = own_stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert len(own_stack.attempts(job_id)) == 1
    assert own_stack.chain(job.manifest) == chain_of(60)
    assert own_stack.broken_invariants() == []


def test_connections_that_are_cut_all_the_time_cost_no_attempt(own_stack: Stack) -> None:
    own_stack.start_worker()
    own_stack.start_janitor()
    job_id = own_stack.submit(LONG)
    own_stack.wait_for_step(job_id, 5)

    for _ in range(20):
        with postgres_admin(own_stack.servers.postgres) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where pid <> pg_backend_pid() and usename = 'postgres'"
            )
        time.sleep(0.15)
    own_stack.engine.dispose()

    job = own_stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert len(own_stack.attempts(job_id)) == 1
    assert own_stack.broken_invariants() == []


def test_a_worker_that_starts_before_postgres_waits_for_it(own_stack: Stack) -> None:
    job_id = own_stack.submit("steps=3")
    stop(own_stack.servers.postgres, signal.SIGINT)
    own_stack.start_worker()
    own_stack.start_janitor()
    time.sleep(4)

    own_stack.servers.postgres.start()
    own_stack.engine.dispose()

    assert own_stack.wait(job_id, seconds=60).status == "succeeded"


def test_too_long_without_postgres_ends_in_a_checkpoint_and_not_in_a_lost_run(own_stack: Stack) -> None:
    own_stack.start_worker(TUNEPOOL_BLIND_SECONDS="1.5")
    job_id = own_stack.submit("steps=400 step_seconds=0.05 save=1000")
    own_stack.wait_for_step(job_id, 5)
    trainer = own_stack.trainers()[0]

    stop(own_stack.servers.postgres, signal.SIGINT)
    trainer.wait(10)
    own_stack.servers.postgres.start()
    own_stack.engine.dispose()
    own_stack.start_janitor()

    job = own_stack.wait(job_id, seconds=90)
    assert job.status == "succeeded", job.error
    assert own_stack.attempts(job_id)[0].outcome in {"drained", "lost"}
    assert own_stack.chain(job.manifest) == chain_of(400)
