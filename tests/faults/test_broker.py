"""Redis forgets, doubles, hangs or is away; that costs seconds and never a job (faults 13-19)."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from shared.store.bell import ring
from standalone.valkey import EmbeddedValkey
from tests.faults.conftest import relay
from tests.lifecycle.stack import Servers, Stack, chain_of, forget_everything, open_stack, until
from tests.patience import patience

LONG = "steps=60 step_seconds=0.05 save=10"
NO_STALL_LOSES_IT = {"TUNEPOOL_LEASE_SECONDS": "3600"}


def kill(valkey: EmbeddedValkey) -> None:
    assert valkey.pid is not None
    os.kill(valkey.pid, signal.SIGKILL)
    os.waitpid(valkey.pid, 0)


@contextmanager
def at_work(servers: Servers, folder: Path, port: int) -> Iterator[Stack]:
    """A worker, a janitor and a client, all of whose bells go through this port."""
    bells = {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "TUNEPOOL_RING_SECONDS": "2"}
    with open_stack(folder, servers, **bells) as stack:
        stack.start_worker(**NO_STALL_LOSES_IT)
        stack.start_janitor()
        stack.wait_for_worker()
        yield stack


def test_flushall_in_the_middle_loses_nothing_and_runs_nothing_twice(stack: Stack) -> None:
    stack.start_worker(**NO_STALL_LOSES_IT)
    stack.start_janitor()
    running = stack.submit(LONG)
    stack.wait_for_step(running, 1)
    waiting = [stack.submit("steps=3") for _ in range(5)]

    forget_everything(stack)
    late = stack.submit("steps=3")
    forget_everything(stack)

    for job_id in (running, *waiting, late):
        job = stack.wait(job_id, seconds=60)
        assert job.status == "succeeded", job.error
        assert len(stack.attempts(job_id)) == 1
    assert stack.broken_invariants() == []


def test_a_hundred_bells_start_each_job_once(stack: Stack) -> None:
    stack.start_worker(**NO_STALL_LOSES_IT)
    stack.wait_for_worker()
    job_ids = [stack.submit("steps=3") for _ in range(3)]

    for _ in range(50):
        ring("training", stack.settings)
        ring("cpu", stack.settings)

    for job_id in job_ids:
        assert stack.wait(job_id, seconds=60).status == "succeeded"
        assert len(stack.attempts(job_id)) == 1
    assert stack.broken_invariants() == []


def test_half_of_the_bells_lost_and_some_doubled_cost_no_job_and_no_attempt(servers: Servers, tmp_path: Path) -> None:
    chance, lost, heard = random.Random(18), [], []

    def lose_half(sent: bytes) -> bytes:
        if b"LPUSH" not in sent:
            return sent
        gone = chance.random() < 0.5
        (lost if gone else heard).append(sent)
        # Into a list that nobody reads: Redis answers its sender as ever.
        return sent.replace(b"\r\ntunepool:", b"\r\nnowhere::", 1) if gone else sent

    with relay(servers.valkey.socket, alter=lose_half) as line, at_work(servers, tmp_path, line.port) as stack:
        job_ids = []
        for _ in range(6):
            job_ids.append(stack.submit("steps=3"))
            for lane in ("cpu", "training") if chance.random() < 0.5 else ():
                ring(lane, stack.settings)
            time.sleep(chance.uniform(0.0, 0.5))

        for job_id in job_ids:
            assert stack.wait(job_id, seconds=60).status == "succeeded"
            assert len(stack.attempts(job_id)) == 1
        assert stack.broken_invariants() == []
        assert min(len(lost), len(heard)) > 5


def test_without_any_bell_the_worker_finds_its_work_itself(own_stack: Stack) -> None:
    own_stack.start_worker(**NO_STALL_LOSES_IT)
    own_stack.wait_for_worker()
    time.sleep(1)
    kill(own_stack.servers.valkey)

    # Sweeps come every second here; each of the two lanes waits for one and starts an interpreter.
    job = own_stack.wait(own_stack.submit("steps=3"), seconds=30)

    assert job.status == "succeeded", job.error
    assert own_stack.broken_invariants() == []


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_broker_that_goes_and_comes_disturbs_no_training_and_delays_the_next(own_stack: Stack, fault: str) -> None:
    valkey = own_stack.servers.valkey
    own_stack.start_worker(**NO_STALL_LOSES_IT)
    own_stack.start_janitor()
    running = own_stack.submit(LONG)
    own_stack.wait_for_step(running, 1)

    if fault == "killed":
        kill(valkey)
    else:
        os.kill(valkey.pid, signal.SIGSTOP)
    began = time.monotonic()
    queued = own_stack.submit("steps=3")
    accepted = time.monotonic() - began
    time.sleep(2)
    if fault == "killed":
        valkey.start()
    else:
        os.kill(valkey.pid, signal.SIGCONT)

    assert accepted < patience(1.5), "a submission must not wait for the broker"
    for job_id in (running, queued):
        job = own_stack.wait(job_id, seconds=60)
        assert job.status == "succeeded", job.error
        assert len(own_stack.attempts(job_id)) == 1
    assert own_stack.chain(own_stack.job(running).manifest) == chain_of(60)
    assert own_stack.broken_invariants() == []


def test_a_worker_hears_bells_again_after_the_broker_came_back_empty(own_stack: Stack) -> None:
    valkey = own_stack.servers.valkey
    own_stack.start_worker(TUNEPOOL_SWEEP_SECONDS="3600")  # no help from the watchdog: the bell itself must work
    own_stack.wait_for_worker()
    assert own_stack.wait(own_stack.submit("steps=2")).status == "succeeded"
    kill(valkey)
    valkey.start()
    forget_everything(own_stack)

    job_id = own_stack.submit("steps=2")

    def rung() -> bool:
        ring("cpu", own_stack.settings)
        ring("training", own_stack.settings)
        time.sleep(0.5)
        return own_stack.job(job_id).status == "succeeded"

    until(rung, seconds=30, what="a bell that is heard")


def test_a_broker_without_memory_costs_no_submission_and_no_job(own_stack: Stack) -> None:
    own_stack.start_worker(**NO_STALL_LOSES_IT)
    own_stack.wait_for_worker()
    with redis.Redis.from_url(own_stack.servers.valkey.client_url) as client:
        client.config_set("maxmemory", "1")

    job_id = own_stack.submit("steps=3")

    assert not ring("training", own_stack.settings)
    assert own_stack.wait(job_id, seconds=60).status == "succeeded"
    with redis.Redis.from_url(own_stack.servers.valkey.client_url) as client:
        client.config_set("maxmemory", "0")  # or it cannot save and would have to be killed
