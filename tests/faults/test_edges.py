"""A process dies or freezes exactly at an edge, by failpoint (faults 2, 3, 5-8, 11, 25, 26, 49)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import get_args

import httpx2
import psutil
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared.contract.documents import StoredLog
from shared.failpoints import Edge
from shared.jobs import trainer_log
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, CheckpointRow, FileRow, JobRow, LogPieceRow
from tests import living
from tests.faults.conftest import api_process, make_secret
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until
from tests.patience import patience

SHORT = "steps=9 step_seconds=0.02 save=3"
# The edges of an attempt, and how the attempt that died there is remembered.
SUPERVISED: dict[Edge, list[str]] = {
    "claim_before_commit": ["succeeded"],  # nothing was leased, so nothing was lost
    "after_claim": ["lost", "succeeded"],
    "after_staging": ["lost", "succeeded"],
    "after_launch": ["lost", "succeeded"],
    "checkpoint_uploaded": ["lost", "succeeded"],
    "adapter_uploaded": ["lost", "succeeded"],
    "publish_before_commit": ["lost", "succeeded"],
    "after_publish": ["succeeded"],  # it was known by then, and nobody need say more
}
API: set[Edge] = {"submit_before_commit", "submit_after_commit"}
# Those of sweeps and schedules: tests/lifecycle/test_sweeps.py, tests/integration/test_schedules.py.
JANITOR: set[Edge] = {"reap_before_commit", "sweep_before_commit", "schedule_before_commit"}


def test_every_edge_has_its_fault() -> None:
    assert {*SUPERVISED, *API, *JANITOR} == set(get_args(Edge))


def test_a_supervisor_that_dies_at_an_edge_costs_an_attempt_at_most_and_nothing_is_published_twice(
    servers: Servers, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as crowd:  # most of it is waiting for leases to end
        found = crowd.map(lambda edge: outcomes_after_death_at(edge, tmp_path / edge, servers), SUPERVISED)

    assert dict(zip(SUPERVISED, found, strict=True)) == SUPERVISED


def outcomes_after_death_at(edge: Edge, home: Path, servers: Servers) -> list[str | None]:
    """Run a job whose supervisor dies there once; how its attempts ended."""
    with open_stack(home, servers) as stack:
        # Only the death may cost an attempt, however slow several stacks at once are.
        stack.start_worker(TUNEPOOL_FAILPOINT=f"{edge}:exit:once", TUNEPOOL_LEASE_SECONDS="3600")
        stack.start_janitor()
        job_id = stack.submit(SHORT)
        until((stack.settings.home / "failpoint").exists, seconds=90, what=f"the death at {edge}")
        if "lost" in SUPERVISED[edge]:
            until(partial(lapsed, stack, job_id), what="the reaper")
        job = stack.wait(job_id, seconds=90)
        assert job.status == "succeeded", (edge, job.error)
        assert stack.chain(job.manifest) == chain_of(9)
        with Session(stack.engine) as session:
            assert session.scalars(select(func.count()).select_from(AdapterRow)).one() == 1
            assert sorted(session.scalars(select(CheckpointRow.step))) == [3, 6, 9]
        assert stack.broken_invariants() == []
        return [row.outcome for row in stack.attempts(job.id)]


def lapsed(stack: Stack, job_id: str) -> bool:
    """End the lease of the job's first attempt; whether that has ended by now."""
    first, *_ = stack.attempts(job_id)
    # Whoever has the row just now may wait for a core; the lock is not waited for any longer than the product would.
    with suppress(OperationalError), session_scope(stack.engine) as session:
        its_own = update(JobRow).where(JobRow.id == job_id, JobRow.fence == first.fence, JobRow.status == "running")
        session.execute(its_own.values(lease_until=func.now() - timedelta(hours=1)))
    return first.ended_at is not None


def test_the_log_of_a_supervisor_that_was_killed_is_told_as_far_as_known_and_handed_over_by_the_next_start(
    own_stack: Stack,
) -> None:
    worker = own_stack.start_worker()
    own_stack.wait_for_worker()
    job_id = own_stack.submit("steps=2000 step_seconds=0.05 print=loaded")
    with Session(own_stack.engine) as session:
        until(lambda: session.scalars(select(LogPieceRow.text)).all(), what="the first line of the log")
    for process in (*living.family(worker.pid), worker):
        with suppress(psutil.NoSuchProcess):
            process.kill()

    with Session(own_stack.engine) as session:
        job = own_stack.job(job_id)
        live = trainer_log.of_attempt(session, job, number=1)
        assert trainer_log.joined(trainer_log.pieces(session, job_id, live.fence)) == "loaded\n"
    own_stack.start_worker()
    own_stack.start_janitor()

    def stored() -> StoredLog | None:
        with Session(own_stack.engine) as session:
            return trainer_log.of_attempt(session, own_stack.job(job_id), number=1).stored

    log = until(stored, seconds=60, what="the log in the store")
    assert own_stack.read(log.key) == b"loaded\n"


def test_a_supervisor_frozen_before_its_commit_publishes_nothing_when_it_wakes(stack: Stack) -> None:
    stack.start_worker(TUNEPOOL_FAILPOINT="adapter_uploaded:freeze:once")
    stack.start_janitor()
    job_id = stack.submit("steps=80 step_seconds=0.05 save=100")
    until((stack.settings.home / "failpoint").exists, what="the freeze")
    frozen = until(
        lambda: [one for one in living.family(stack.processes[0].pid) if living.is_stopped(one)],
        what="the frozen supervisor",
    )

    until(lambda: len(stack.attempts(job_id)) == 2, seconds=30, what="a second attempt")
    stack.wait_for_step(job_id, 5)
    for process in frozen:
        process.resume()  # amid the second attempt: only the fence stands between the first and its commit
    job = stack.wait(job_id, "succeeded", seconds=30)

    assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
    assert job.manifest["prefix"].endswith(f"a{job.fence:06d}/adapter")
    assert stack.broken_invariants() == []


def test_a_janitor_that_dies_in_its_pass_leaves_the_whole_pass_to_the_next(stack: Stack) -> None:
    worker = stack.start_worker()
    job_id = stack.submit("steps=60 step_seconds=0.05 save=10 hold=30")
    stack.wait_for_step(job_id, 12)
    worker.kill()
    deadly = stack.start(["-m", "worker.janitor"], name="deadly", TUNEPOOL_FAILPOINT="reap_before_commit:exit:once")
    assert deadly.wait(patience(30)) != 0
    assert stack.job(job_id).status == "running"

    stack.start_janitor()

    stack.wait(job_id, "queued", seconds=15)
    assert [row.outcome for row in stack.attempts(job_id)] == ["lost"]
    assert stack.broken_invariants() == []


# --- the API ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", sorted(API))
def test_a_client_whose_answer_was_lost_repeats_itself_and_has_one_job(stack: Stack, edge: Edge) -> None:
    file_id = stack.upload(b'{"text": "fake: steps=2"}\n' * 12)
    body = {"model": "tiny", "training_file": file_id}
    headers = {"Authorization": f"Bearer {make_secret(stack)}", "Idempotency-Key": "once-only"}

    with api_process(stack, TUNEPOOL_FAILPOINT=f"{edge}:exit:once") as url, pytest.raises(httpx2.TransportError):
        httpx2.post(f"{url}/v1/fine_tuning/jobs", json=body, headers=headers, timeout=patience(20))
    with api_process(stack) as url:
        answer = httpx2.post(f"{url}/v1/fine_tuning/jobs", json=body, headers=headers, timeout=patience(20))

    assert answer.status_code == 200, answer.text
    assert ("Idempotent-Replayed" in answer.headers) == (edge == "submit_after_commit")
    with Session(stack.engine) as session:
        assert session.scalars(select(JobRow.id)).all() == [answer.json()["id"]]
        assert session.get_one(FileRow, file_id).status == "uploaded"
