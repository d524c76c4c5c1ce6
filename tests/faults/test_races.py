"""Two things at once: whoever wins, the answer is one (faults 38, 39, 49)."""

from __future__ import annotations

import random
import time
from contextlib import suppress

from shared.errors import Invalid
from tests.lifecycle.stack import Stack, until


def test_cancel_against_completion_has_exactly_one_winner(stack: Stack) -> None:
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    chance = random.Random(7)

    for _ in range(12):
        job_id = stack.submit("steps=3 step_seconds=0.01")
        until(lambda job_id=job_id: stack.job(job_id).status not in ("validating_files", "queued"))
        time.sleep(chance.uniform(0.0, 0.5))
        refused = True
        with suppress(Invalid):
            stack.cancel(job_id)
            refused = False
        job = stack.wait(job_id)
        assert job.status == ("succeeded" if refused else "cancelled")

    assert stack.broken_invariants() == []


def test_cancel_against_claim_leaves_no_device_leased(stack: Stack) -> None:
    stack.start_worker()
    stack.start_janitor()
    stack.wait_for_worker()
    chance = random.Random(8)

    for _ in range(12):
        job_id = stack.submit("steps=200 step_seconds=0.01")
        time.sleep(chance.uniform(0.0, 0.4))
        stack.cancel(job_id)
        assert stack.wait(job_id).status == "cancelled"

    assert stack.trainers() == []
    assert stack.broken_invariants() == []


def test_three_janitors_have_the_effect_of_one(stack: Stack) -> None:
    worker = stack.start_worker()
    for _ in range(3):
        stack.start_janitor()
    job_id = stack.submit("steps=60 step_seconds=0.05 save=10 hold=30 once")
    stack.wait_for_checkpoint(job_id, 10)

    worker.kill()
    stack.wait(job_id, "queued")
    stack.start_worker()

    assert stack.wait(job_id, seconds=60).status == "succeeded"
    assert [row.outcome for row in stack.attempts(job_id)] == ["lost", "succeeded"]
    assert stack.broken_invariants() == []
