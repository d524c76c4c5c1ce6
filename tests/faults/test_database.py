"""Postgres restarts, drops connections, or is away: training goes on, publishing waits (faults 20-24, 29)."""

from __future__ import annotations

import os
import signal
import time

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session

from shared.store.locks import one_at_a_time
from standalone.postgres import EmbeddedPostgres
from tests import living
from tests.faults.conftest import postgres_admin
from tests.lifecycle.stack import Stack, chain_of, until
from tests.patience import pace

LONG = "steps=60 step_seconds=0.05 save=10"
HELD = f"{LONG} hold=30 once"  # its first attempt waits there until it is ended, or may go on
NO_STALL_LOSES_IT = {"TUNEPOOL_LEASE_SECONDS": "3600"}


def stop(postgres: EmbeddedPostgres, number: signal.Signals) -> None:
    assert postgres.pid is not None
    os.kill(postgres.pid, number)
    os.waitpid(postgres.pid, 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_a_restart_of_postgres_requeues_nothing_and_training_goes_on(own_stack: Stack, how: signal.Signals) -> None:
    own_stack.start_worker()
    own_stack.start_janitor()
    job_id = own_stack.submit(LONG)
    own_stack.wait_for_step(job_id, 1)
    trainer = own_stack.trainers()[0]
    own_stack.wait_for_step(job_id, 5)

    stop(own_stack.servers.postgres, how)
    time.sleep(pace(5))  # longer than the lease
    assert own_stack.trainers() in ([], [trainer])  # it may have ended its steps
    own_stack.servers.postgres.start()
    own_stack.engine.dispose()

    job = own_stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert len(own_stack.attempts(job_id)) == 1
    assert own_stack.chain(job.manifest) == chain_of(60)
    assert own_stack.broken_invariants() == []


def test_connections_that_are_cut_all_the_time_cost_no_attempt(own_stack: Stack) -> None:
    own_stack.start_worker(**NO_STALL_LOSES_IT)
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


def in_deadlock(stack: Stack, its_lock: str) -> None:
    """Have whoever next leases or frees a device under this advisory lock die of a real deadlock with us.

    It holds `its_lock` and waits for the device, we hold the device and then want that lock. It looks after
    two seconds for a deadlock and finds it; we would look after a minute.
    """
    waiting = text(
        "select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        " and (query ilike 'update devices set leased%' or query ilike 'select%from devices%for update')"
    )
    with stack.engine.connect() as ours:
        ours.execute(text("set local deadlock_timeout = '1min'"))
        ours.execute(text("select from devices for update"))

        def victim_waits() -> bool:
            with stack.engine.connect() as other:
                return other.execute(waiting).first() is not None

        until(victim_waits, what="somebody who waits for the device")
        one_at_a_time(Session(ours), its_lock)


def test_a_deadlock_is_answered_by_trying_again_with_one_effect(stack: Stack) -> None:
    database = make_url(stack.settings.database_url).database
    with postgres_admin(stack.servers.postgres) as admin:
        admin.execute(f"alter database {database} set deadlock_timeout = '2s'")
    worker = stack.start_worker()
    stack.wait_for_worker()
    job_id = stack.submit(HELD)
    in_deadlock(stack, f"plan:{stack.settings.pool}")
    until(lambda: "deadlock detected" in (stack.home / "worker-home.log").read_text(), what="a claim that gave way")
    stack.wait_for_checkpoint(job_id, 10)
    worker.kill()
    stack.start_janitor()
    in_deadlock(stack, "janitor:reap")
    stack.wait(job_id, "queued", seconds=15)
    until(lambda: "deadlock detected" in (stack.home / "janitor.log").read_text(), what="a reaper that gave way")
    stack.start_worker()

    job = stack.wait(job_id, seconds=60)

    assert job.status == "succeeded", job.error
    assert job.failures == 1
    assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
    assert stack.chain(job.manifest) == chain_of(60)
    assert stack.broken_invariants() == []


def test_statements_that_are_cancelled_or_cannot_be_serialised_cost_no_attempt(stack: Stack) -> None:
    database = make_url(stack.settings.database_url).database
    with postgres_admin(stack.servers.postgres) as admin:  # what an operator may have set for the whole server
        admin.execute(f"alter database {database} set default_transaction_isolation = 'repeatable read'")
    stack.start_worker(**NO_STALL_LOSES_IT)
    stack.start_janitor()
    job_id = stack.submit(HELD)
    stack.wait_for_step(job_id, 5)

    waiting = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with (
        postgres_admin(stack.servers.postgres, database) as admin,
        postgres_admin(stack.servers.postgres, database) as looking,  # within a transaction one sees an old picture
    ):
        admin.execute("set default_transaction_isolation = 'read committed'")
        for cancels in (False, True, False, True):
            with admin.transaction():
                admin.execute("update jobs set version = version + 1 where status = 'running'")
                until(
                    lambda: looking.execute(waiting).fetchone() is not None, what="a heartbeat that waits for the row"
                )
                if cancels:
                    for (pid,) in looking.execute(waiting).fetchall():
                        looking.execute("select pg_cancel_backend(%s)", [pid])
    stack.let_go_on(job_id)

    job = stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert [row.outcome for row in stack.attempts(job_id)] == ["succeeded"]
    assert stack.chain(job.manifest) == chain_of(60)
    log = (stack.home / "worker-home.log").read_text()
    assert "could not serialize" in log
    assert "canceling statement due to user request" in log
    assert stack.broken_invariants() == []


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
    assert living.await_end([trainer]) == []
    own_stack.servers.postgres.start()
    own_stack.engine.dispose()
    own_stack.start_janitor()

    job = own_stack.wait(job_id, seconds=90)
    assert job.status == "succeeded", job.error
    assert own_stack.attempts(job_id)[0].outcome in {"drained", "lost"}
    assert own_stack.chain(job.manifest) == chain_of(400)
