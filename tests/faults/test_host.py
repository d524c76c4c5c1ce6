"""A host that is full or starts again (faults 33, 61)."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared.store.db import session_scope
from shared.store.tables import DeviceRow, WorkerRow
from tests import living
from tests.lifecycle.stack import Stack

ROOM, LARGE, SMALL = 16 * 2**20, 6 * 2**20, 3 * 2**20


@pytest.fixture
def small_disk(stack: Stack) -> Iterator[Path]:
    """A file system of 16 MiB as a worker's home."""
    home = stack.home / "small"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(home)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}; a quota stands for it below")
    yield home
    subprocess.run(["umount", "--lazy", str(home)], check=True)  # the worker that has it open ends soon


def large_file(stack: Stack) -> str:
    rows = [
        json.dumps({"text": "fake: steps=2"}),
        *(json.dumps({"text": "x" * 50_000}) for _ in range(LARGE // 50_000)),
    ]
    return stack.upload("\n".join(rows).encode())


def test_a_full_disk_ends_an_attempt_by_name_and_the_worker_goes_on_once_there_is_room(
    stack: Stack, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(ROOM - SMALL))
    stack.start_worker(home="small", TUNEPOOL_MAX_ATTEMPTS="2")
    stack.start_janitor()
    stack.wait_for_worker()
    file_id = large_file(stack)

    large, small = stack.submit_file(file_id), stack.submit("steps=2")
    failed = stack.wait(large, seconds=60)
    assert (failed.status, failed.error["code"]) == ("failed", "disk_full")
    assert "TUNEPOOL_HOME" in failed.error["message"]
    assert [row.outcome for row in stack.attempts(large)] == ["crashed", "crashed"]
    assert stack.wait(small, seconds=60).status == "succeeded"
    assert list((small_disk / "work").iterdir()) == [], "what a failed attempt left takes the next one's room"

    (small_disk / "ballast").unlink()
    assert stack.wait(stack.submit_file(file_id), seconds=60).status == "succeeded"
    assert stack.broken_invariants() == []


def test_a_host_without_room_ends_the_attempt_by_name_and_leaves_other_jobs_alone(stack: Stack) -> None:
    worker = stack.start_worker(TUNEPOOL_MAX_ATTEMPTS="2")
    stack.start_janitor()
    stack.wait_for_worker()
    for process in (psutil.Process(worker.pid), *living.family(worker.pid)):
        process.rlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))  # a quota: the disk is full for whoever is over it

    large, small = stack.submit_file(large_file(stack)), stack.submit("steps=2")

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
    job_id = stack.submit("steps=60 step_seconds=0.05 save=10 hold=30 once")
    stack.wait_for_checkpoint(job_id, 10)
    worker.kill()
    worker.wait()
    with session_scope(stack.engine) as session:
        session.execute(update(WorkerRow).values(boot_id="the boot before this one"))

    stack.start_worker(**hour)

    assert stack.wait(job_id, seconds=60).status == "succeeded"
    assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
    with Session(stack.engine) as session:
        assert session.scalars(select(DeviceRow.leased_by)).all() == [None]


def test_a_host_that_can_keep_no_log_trains_all_the_same_and_says_so(own_stack: Stack) -> None:
    own_stack.settings.home.mkdir(parents=True, exist_ok=True)
    (own_stack.settings.home / "logs").write_text("no folder can be made here")
    own_stack.start_worker()
    own_stack.start_janitor()

    job = own_stack.wait(own_stack.submit("steps=3"))

    assert job.status == "succeeded", job.error
    assert [attempt.outcome for attempt in own_stack.attempts(job.id)] == ["succeeded"]
    assert "log.not_kept" in (own_stack.home / "worker-home.log").read_text()
