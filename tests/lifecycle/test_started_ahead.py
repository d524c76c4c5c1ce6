"""Trainers that were started ahead: each carries out one attempt as a cold one would, and none outlives its worker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from shared.operating import administration
from shared.store.db import session_scope
from shared.store.tables import WorkerRow
from tests import living
from tests.factories import make_caller
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until
from tests.patience import patience
from tests.walls import around

# Evaluations have spares as well (test_evaluations_ahead.py); theirs loads PyTorch.
AHEAD = {"TUNEPOOL_KEEP_WARM": "imports", "TUNEPOOL_EVALUATOR": "tests.fake_evaluator"}


def log_of(stack: Stack) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", (stack.home / "worker-home.log").read_text())


def spares(stack: Stack) -> list[psutil.Process]:
    return [process for process in stack.trainers() if living.tag(process).startswith("spare/")]


def waiting(stack: Stack, *, not_these: set[int] | None = None) -> psutil.Process:
    """A spare that waits for its work."""

    def ready() -> psutil.Process | None:
        told = log_of(stack)
        pids, given = (set(re.findall(rf"spare\.{word}.*\bpid=(\d+)", told)) for word in ("ready", "handed_over"))
        return next(
            (spare for spare in spares(stack) if str(spare.pid) in pids - given and spare.pid not in (not_these or ())),
            None,
        )

    found: psutil.Process = until(ready, what="a spare that waits")
    return found


def handed_over(stack: Stack, job_id: str) -> int | None:
    """The pid of the spare that the job's last attempt has got."""
    pids = re.findall(rf"spare\.handed_over.*\bjob_id={job_id}\b.*\bpid=(\d+)", log_of(stack))
    return int(pids[-1]) if pids else None


def outcomes(stack: Stack, job_id: str) -> list[str | None]:
    return [attempt.outcome for attempt in stack.attempts(job_id)]


@pytest.fixture(scope="module")
def warm(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    known = {**AHEAD, "TUNEPOOL_LEASE_SECONDS": "3600"}
    with open_stack(tmp_path_factory.mktemp("warm"), servers, **known) as made:
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made
        broken = made.broken_invariants()
    assert broken == []


def test_a_spare_carries_out_one_attempt_and_another_waits_afterwards(warm: Stack) -> None:
    spare = waiting(warm)
    folder = Path(spare.cwd()).parent

    job = warm.wait(warm.submit("steps=10 step_seconds=0.05 save=5"))

    assert job.status == "succeeded", job.error
    assert job.manifest is not None
    assert warm.chain(job.manifest) == chain_of(10)
    assert handed_over(warm, job.id) == spare.pid
    assert waiting(warm, not_these={spare.pid}).pid != spare.pid
    assert not living.is_alive(spare)
    assert not folder.exists(), "nothing of the attempt is left on the disk"


def test_two_devices_have_a_spare_each_and_a_job_on_both_starts_cold(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    two = {**AHEAD, "TUNEPOOL_CPU_SLOTS": "2"}
    with open_stack(tmp_path_factory.mktemp("two"), servers, **two) as made:
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        first = waiting(made)
        second = waiting(made, not_these={first.pid})

        singles = [made.submit("steps=5 step_seconds=0.02") for _ in range(2)]
        assert [made.wait(job_id).status for job_id in singles] == ["succeeded", "succeeded"]
        assert {handed_over(made, job_id) for job_id in singles} <= {first.pid, second.pid, None}
        assert handed_over(made, singles[0]) is not None

        both = made.submit("steps=5", placement={"strategy": "ddp", "gpus": 2})
        after = [made.submit("steps=5 step_seconds=0.02") for _ in range(3)]
        assert [made.wait(job_id).status for job_id in (both, *after)] == ["succeeded"] * 4
        assert handed_over(made, both) is None
        assert waiting(made)
        broken = made.broken_invariants()
    assert broken == []


def test_a_spare_has_the_walls_of_a_trainer_that_starts_cold(warm: Stack, servers: Servers, tmp_path: Path) -> None:
    waiting(warm)
    slow = "steps=1000 step_seconds=0.05 save=1000"
    with open_stack(tmp_path, servers) as cold:
        cold.start_worker()
        cold.start_janitor()
        cold.wait_for_worker()
        jobs = {stack.home: (stack, stack.submit(slow)) for stack in (cold, warm)}
        seen = {home: walls(*job) for home, job in jobs.items()}

    assert seen[warm.home] == seen[cold.home]
    assert seen[warm.home]["TUNEPOOL_DEVICES"]


def walls(stack: Stack, job_id: str) -> dict[str, Any]:
    """What the kernel says of the job's trainer at work, with folders and numbers of its own taken out."""
    stack.wait_for_step(job_id, 1)
    trainer = next(process for process in stack.trainers() if living.environment(process).get("TUNEPOOL_DEVICES"))
    known = around(trainer, home=stack.home, written="events.jsonl")
    stack.cancel(job_id)
    stack.wait(job_id)
    return known


def test_a_spare_that_is_killed_before_its_job_costs_no_attempt(warm: Stack) -> None:
    spare = waiting(warm)
    spare.kill()

    job_id = warm.submit("steps=5")

    assert warm.wait(job_id).status == "succeeded"
    assert outcomes(warm, job_id) == ["succeeded"]
    assert handed_over(warm, job_id) != spare.pid


def test_a_spare_that_is_killed_after_its_handover_is_a_trainer_that_has_crashed(warm: Stack) -> None:
    waiting(warm)
    job_id = warm.submit("steps=60 step_seconds=0.05 save=5 hold=30 once")
    warm.wait_for_checkpoint(job_id, 5)
    pid = handed_over(warm, job_id)
    assert pid is not None

    os.kill(pid, signal.SIGKILL)
    job = warm.wait(job_id)

    assert outcomes(warm, job_id) == ["crashed", "succeeded"]
    assert job.manifest is not None
    assert warm.chain(job.manifest) == chain_of(60)


def test_a_spare_dies_with_its_supervisor_and_a_sibling_takes_the_seat(warm: Stack) -> None:
    spare = waiting(warm)
    supervisor = living.parent(spare)
    assert supervisor is not None
    supervisor.kill()

    until(lambda: not living.is_alive(spare), what="the end of the spare")
    job_id = warm.submit("steps=5")

    assert warm.wait(job_id).status == "succeeded"
    assert outcomes(warm, job_id) == ["succeeded"]
    assert living.parent(waiting(warm, not_these={spare.pid})) != supervisor


def test_a_worker_that_drains_lets_its_spare_go_and_has_another_once_undrained(warm: Stack) -> None:
    spare = waiting(warm)
    with session_scope(warm.engine) as session:
        operator = make_caller(session, scopes=("admin",))
        worker_id = session.scalars(select(WorkerRow.id)).one()
        administration.set_draining(session, operator, worker_id, draining=True)

    until(lambda: not spares(warm), what="no spare")
    folders = warm.home / "home" / "work" / "spare"
    until(lambda: not any(listed(folders / name) for name in listed(folders)), seconds=5, what="no folder of a spare")
    with session_scope(warm.engine) as session:
        administration.set_draining(session, operator, worker_id, draining=False)

    assert waiting(warm, not_these={spare.pid})


def listed(folder: Path) -> list[str]:
    """What is in a folder that may just be going."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def test_no_spare_outlives_its_worker_however_that_ends(servers: Servers, tmp_path: Path) -> None:
    with open_stack(tmp_path, servers, **AHEAD) as stack:
        for end in (signal.SIGTERM, signal.SIGKILL):
            worker: subprocess.Popen[bytes] = stack.start_worker()
            waiting(stack)
            worker.send_signal(end)
            worker.wait(patience(30))
            until(lambda: not stack.trainers(), seconds=5, what="the end of the spare")
