"""A host that is full or starts again (faults 33, 61)."""

from __future__ import annotations

import json
import resource

import psutil
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.db import session_scope
from shared.tables import DeviceRow, WorkerRow
from tests.lifecycle.stack import Stack


def test_a_host_without_room_ends_the_attempt_by_name_and_leaves_other_jobs_alone(stack: Stack) -> None:
    worker = stack.start_worker(TUNEPOOL_MAX_ATTEMPTS="2")
    stack.start_janitor()
    stack.wait_for_worker()
    limit = 4 * 2**20
    for process in (psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)):
        process.rlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a quota: the disk is full for whoever is over it
    rows = [json.dumps({"text": "fake: steps=2"}), *(json.dumps({"text": "x" * 50_000}) for _ in range(120))]

    large, small = stack.submit_file(stack.upload("\n".join(rows).encode())), stack.submit("steps=2")

    job = stack.wait(large, seconds=60)
    assert (job.status, job.error["code"]) == ("failed", "disk_full")
    assert "TUNEPOOL_HOME" in job.error["message"]
    assert [row.outcome for row in stack.attempts(large)] == ["crashed", "crashed"]
    assert stack.wait(small, seconds=60).status == "succeeded"
    assert stack.broken_invariants() == []


def test_a_host_that_starts_again_gives_up_all_leases_of_its_earlier_life_at_once(stack: Stack) -> None:
    hour = {"TUNEPOOL_LEASE_SECONDS": "3600"}
    worker = stack.start_worker(**hour)
    stack.start_janitor()
    job_id = stack.submit("steps=60 step_seconds=0.05 save=10")
    stack.wait_for_step(job_id, 12)
    worker.kill()
    worker.wait()
    with session_scope(stack.engine) as session:
        session.execute(update(WorkerRow).values(boot_id="the boot before this one"))

    stack.start_worker(**hour)

    assert stack.wait(job_id, seconds=60).status == "succeeded"
    assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
    with Session(stack.engine) as session:
        assert session.scalars(select(DeviceRow.leased_by)).all() == [None]
