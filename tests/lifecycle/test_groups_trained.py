"""Jobs that the pool trains together with the real trainer: each adapter is, byte for byte, what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.locks import one_at_a_time
from shared.store.tables import JobRow, PoolRow
from tests.lifecycle.real_trainer import chat_file, curve_of, open_real_stack, weights_of
from tests.lifecycle.stack import Servers, Stack
from tests.patience import patience

pytestmark = pytest.mark.timeout(patience(600))

TRAINING = {"max_length": 256, "num_train_epochs": 2, "batch_size": 4, "save_steps": 2}
JOBS: tuple[tuple[int, dict[str, Any]], ...] = (  # how many rows each has, and its adapter
    (12, {"method": "qlora", "r": 4}),
    (9, {"method": "qlora", "r": 8, "target_modules": ["q_proj", "v_proj"]}),
    (10, {"method": "qlora", "r": 4, "use_rslora": True}),
)


@pytest.fixture
def stack(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    together = {
        "TUNEPOOL_COTRAINER": "worker.train.together",
        "TUNEPOOL_COTRAINING": "project",
        "TUNEPOOL_LEASE_SECONDS": "3600",
    }
    with open_real_stack(tmp_path, servers, **together) as made:
        with session_scope(made.engine) as session:
            session.add(PoolRow(name=made.settings.pool, held=True))
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made
        broken = made.broken_invariants()
    assert broken == []
    assert made.survivors() == [], "a trainer outlived its worker"


def trained(stack: Stack, **columns: Any) -> list[JobRow]:
    """All the jobs, submitted while the pool is held and then let go."""
    jobs = [
        stack.submit_file(stack.upload(chat_file(rows)), seed=7, adapter=lora, training=TRAINING) for rows, lora in JOBS
    ]
    for job_id in jobs:
        stack.wait(job_id, "queued", seconds=120)
    with session_scope(stack.engine) as session:
        one_at_a_time(session, f"plan:{stack.settings.pool}")  # no plan under way has half of what is written here
        session.execute(update(JobRow).where(JobRow.id.in_(jobs)).values(expected_seconds=60.0, **columns))
        session.execute(update(PoolRow).values(held=False))
    ring("training", stack.settings)
    ended = [stack.wait(job_id, seconds=480) for job_id in jobs]
    with session_scope(stack.engine) as session:
        session.execute(update(PoolRow).values(held=True))
    assert [job.status for job in ended] == ["succeeded"] * len(JOBS), [job.error for job in ended]
    return ended


def test_the_adapters_of_a_group_are_byte_for_byte_those_of_each_job_alone(stack: Stack) -> None:
    alone = trained(stack, cotraining_ground=None)
    together = trained(stack)

    assert [[row.together for row in stack.attempts(job.id)] for job in alone] == [[None]] * 3
    assert [[row.together for row in stack.attempts(job.id)] for job in together] == [[3]] * 3
    assert [weights_of(job) for job in together] == [weights_of(job) for job in alone]
    assert len({weights_of(job) for job in together}) == 3
    assert [curve_of(stack, job.id) for job in together] == [curve_of(stack, job.id) for job in alone]
    shares = [row.device_share for job in together for row in stack.attempts(job.id)]
    assert all(share is not None and 0 < share < 1 for share in shares)
