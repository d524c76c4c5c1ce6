"""The real trainer on a tiny random model, disturbed in every way that ends an attempt (faults 4, 10, 20, 35)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.store.tables import AdapterRow
from tests.faults.conftest import own_servers
from tests.lifecycle.real_trainer import chat_file, curve_of, open_real_stack, weights_of
from tests.lifecycle.stack import Stack, until
from tests.patience import lease, patience

# So many and so long that some are left for each attempt: what is seen of a trainer lags behind what it does.
STEPS = 100
SAVED_EVERY = 4
TUNEPOOL = {
    "adapter": {"method": "qlora", "r": 4, "lora_dropout": 0.1},
    "training": {
        "max_steps": STEPS,
        "batch_size": 12,
        "save_steps": SAVED_EVERY,
        "max_length": 256,
        "learning_rate": 0.001,
    },
}


@pytest.fixture
def real(migrated_cluster: Path, tmp_path: Path) -> Iterator[Stack]:
    """A stack with servers of its own, the real trainer and a real base model."""
    known = {"TUNEPOOL_LEASE_SECONDS": lease(6), "TUNEPOOL_STOP_SECONDS": lease(30)}
    with (
        own_servers(tmp_path, migrated_cluster) as servers,
        open_real_stack(tmp_path / "stack", servers, **known) as made,
    ):
        yield made
    assert made.survivors() == [], "a trainer outlived its worker"


def test_a_job_whose_trainer_worker_and_database_died_ends_with_the_weights_of_one_that_was_left_alone(
    real: Stack,
) -> None:
    worker = real.start_worker()
    real.start_janitor()
    untouched = real.wait(submit(real), "succeeded", seconds=120)
    job_id = submit(real)

    wait_for_own_checkpoint(real, job_id, attempt=1)
    real.trainers()[0].kill()
    wait_for_own_checkpoint(real, job_id, attempt=2)
    worker.kill()
    worker.wait()
    worker = real.start_worker()
    wait_for_own_checkpoint(real, job_id, attempt=3)
    worker.terminate()
    assert worker.wait(patience(60)) == 0
    worker = real.start_worker()
    wait_for_own_checkpoint(real, job_id, attempt=4)
    crash_postgres(real)
    job = real.wait(job_id, seconds=120)

    assert job.status == "succeeded", job.error
    assert [row.outcome for row in real.attempts(job_id)] == ["crashed", "lost", "drained", "succeeded"]
    assert weights_of(job) == weights_of(untouched)
    curve, whole = (dict(curve_of(real, row.id)) for row in (job, untouched))
    assert len(curve.keys() & whole.keys()) > STEPS / 4
    assert {step: loss for step, loss in curve.items() if whole.get(step, loss) != loss} == {}
    assert job.trained_tokens == untouched.trained_tokens
    with Session(real.engine) as session:
        assert len(session.scalars(select(AdapterRow).where(AdapterRow.job_id == job_id)).all()) == 1
    assert real.broken_invariants() == []


def submit(stack: Stack) -> str:
    return stack.submit_file(stack.upload(chat_file(24)), seed=11, **TUNEPOOL)


def wait_for_own_checkpoint(stack: Stack, job_id: str, *, attempt: int) -> None:
    """Until the attempt is at work and has passed a checkpoint. A step alone may be of the attempt before."""

    def passed() -> bool:
        rows = stack.attempts(job_id)
        return len(rows) == attempt and (rows[-1].last_step or 0) > (rows[-1].first_step or 0) + SAVED_EVERY

    until(passed, seconds=60, what=f"a checkpoint of attempt {attempt}")


def crash_postgres(stack: Stack) -> None:
    postgres = stack.servers.postgres
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGQUIT)
    os.waitpid(postgres.pid, 0)
    time.sleep(1)
    postgres.start()
    stack.engine.dispose()
