"""Lines that are cut, silent, slow or lie, between a worker and each of its servers (faults 29-32, 40, deafness)."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import make_url, select
from sqlalchemy.orm import Session

from shared.store.db import session_scope
from shared.store.tables import AdapterRow
from tests.factories import make_queued_job
from tests.faults.conftest import relay, s3_environment, s3_server
from tests.faults.proxy import FAIR, Proxy, Weather
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until
from tests.patience import lease, pace, patience
from worker.host.presence import EXIT_DEAF

LONG = "steps=60 step_seconds=0.05 save=10"
HELD = f"{LONG} hold=30 once"  # its first attempt waits there until it is ended, or may go on


def database_behind(proxy: Proxy, stack: Stack) -> dict[str, str]:
    database = make_url(stack.settings.database_url).database
    return {"DATABASE_URL": f"postgresql+psycopg://postgres@127.0.0.1:{proxy.port}/{database}"}


def test_a_worker_on_a_half_open_line_publishes_nothing_and_goes_on_once_it_is_heard(stack: Stack) -> None:
    with relay(stack.servers.postgres.socket_dir / ".s.PGSQL.5432") as line:
        stack.start_worker(**database_behind(line, stack), TUNEPOOL_SWEEP_SECONDS="1")
        stack.start_janitor()
        job_id = stack.submit(HELD)
        stack.wait_for_checkpoint(job_id, 10)

        line.set(Weather(silent=True))
        line.forget()  # what is open stays open, and nothing comes through it ever again
        stack.let_go_on(job_id)
        # A row that the line left locked is free after idle_in_transaction_session_timeout, 30 s.
        stack.wait(job_id, "queued", seconds=40)
        with Session(stack.engine) as session:
            assert session.scalars(select(AdapterRow)).all() == []
        line.set(FAIR)

        # Its connections are given up after 15 s; the new ones tell it that the lease is gone.
        job = stack.wait(job_id, seconds=60)
        assert job.status == "succeeded", job.error
        assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
        assert stack.chain(job.manifest) == chain_of(60)
        assert stack.broken_invariants() == []
        stack.stop()


def test_a_line_that_is_silent_for_less_than_a_lease_costs_no_attempt(stack: Stack) -> None:
    with relay(stack.servers.postgres.socket_dir / ".s.PGSQL.5432") as line:
        stack.start_worker(**database_behind(line, stack), TUNEPOOL_LEASE_SECONDS=lease(30))
        stack.start_janitor()
        job_id = stack.submit(LONG)
        stack.wait_for_step(job_id, 12)

        line.set(Weather(silent=True))
        time.sleep(pace(4))
        line.set(FAIR)

        job = stack.wait(job_id, seconds=60)
        assert job.status == "succeeded", job.error
        assert len(stack.attempts(job_id)) == 1
        assert stack.broken_invariants() == []
        stack.stop()


WEATHERS = {
    "refusing": Weather(refuse=True),
    "silent": Weather(silent=True),
    "slow": Weather(bytes_per_second=10_000),
    "broken off in the middle": Weather(reset_after_bytes=1000),
}


def test_a_store_in_any_weather_delays_a_job_and_spoils_no_file(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        s3_server() as address,
        relay(address) as line,
        open_stack(tmp_path_factory.mktemp("s3"), servers, **s3_environment(*address)) as stack,
    ):
        stack.start_worker(**s3_environment("127.0.0.1", line.port), TUNEPOOL_LEASE_SECONDS="3600")
        stack.start_janitor()
        stack.wait_for_worker()
        for name, weather in WEATHERS.items():
            job_id = stack.submit("steps=15 step_seconds=0.05 save=5 files=5")
            stack.wait_for_step(job_id, 2)

            line.set(weather)
            if weather.refuse:
                line.cut()
            time.sleep(1.5)
            line.set(FAIR)

            job = stack.wait(job_id, seconds=60)
            assert job.status == "succeeded", (name, job.error)
            assert len(stack.attempts(job_id)) == 1, name
        assert stack.broken_invariants() == []
        stack.stop()
        assert stack.survivors() == []


def test_a_cancelled_job_whose_worker_died_is_cancelled_by_the_reaper(stack: Stack) -> None:
    worker = stack.start_worker(TUNEPOOL_CONTROL_SECONDS="60")  # it cannot hear the order in time
    stack.start_janitor()
    job_id = stack.submit(HELD)
    stack.wait_for_step(job_id, 2)

    stack.cancel(job_id)
    worker.kill()

    assert stack.wait(job_id, seconds=15).status == "cancelled"
    assert [row.outcome for row in stack.attempts(job_id)] == ["cancelled"]
    assert stack.broken_invariants() == []


def test_a_worker_that_hears_no_bell_though_redis_is_well_ends_to_be_started_again(stack: Stack) -> None:
    with relay(stack.servers.valkey.socket) as line:
        worker = stack.start_worker(
            REDIS_URL=f"redis://127.0.0.1:{line.port}/0", TUNEPOOL_DEAF_SECONDS="1", TUNEPOOL_SWEEP_SECONDS="1"
        )
        stack.wait_for_worker()
        time.sleep(1)
        line.forget()
        with session_scope(stack.engine) as session:
            job = make_queued_job(session, stack.caller)
            job.bytes_per_device = 2**50  # it waits for ever, while the worker's device idles

        assert worker.wait(patience(60)) == EXIT_DEAF
        assert "worker.deaf" in (stack.home / "worker-home.log").read_text()
        stack.start_worker()
        done = stack.submit("steps=2")
        assert until(lambda: stack.job(done).status == "succeeded")
