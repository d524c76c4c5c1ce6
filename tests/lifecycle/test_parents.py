"""A job that goes on from a tuned model: its files are brought here, and what is gone ends the job with a reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from sqlalchemy import select

from shared.contract.spec import JobSpec
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, JobRow
from tests.lifecycle.stack import Stack


def tuned(stack: Stack, behaviour: str = "steps=2 save=2") -> JobRow:
    """A job that has succeeded, with the adapter's files that the fake trainer writes."""
    job = stack.wait(stack.submit(behaviour))
    assert job.status == "succeeded", job.error
    return job


def withdraw(job: JobRow, stack: Stack) -> None:
    """As a version before this one does it, which asks no job."""
    with session_scope(stack.engine) as session:
        row = session.scalars(select(AdapterRow).where(AdapterRow.job_id == job.id)).one()
        row.deleted_at = datetime.now(UTC)


def test_the_parents_weights_lie_beside_the_trainer_and_their_hashes_in_the_spec(running: Stack) -> None:
    parent = tuned(running)
    job = running.wait(running.submit("steps=4 parent save=2", model=parent.fine_tuned_model))

    assert job.status == "succeeded", job.error
    assert job.base_model == "tiny"
    assert job.fine_tuned_model == f"ft:tiny:acme::{job.id.removeprefix('ftjob-')}"
    spec = JobSpec.model_validate(job.spec)
    assert spec.parent is not None
    assert (spec.parent.name, spec.parent.init_from) == (parent.fine_tuned_model, "continue")
    assert {file.name: file.sha256 for file in spec.parent.files} == {
        file["name"]: file["sha256"] for file in parent.manifest["files"]
    }
    staged = json.loads(running.read(f"{job.manifest['prefix']}/parent.json"))
    assert staged == {"adapter_config.json": {"peft_type": "LORA"}}
    assert any(value["field"] == "adapter.init_from" and value["reason"] for value in job.auto)


def test_a_job_on_a_tuned_model_resumes_from_its_own_checkpoint(running: Stack) -> None:
    parent = tuned(running)
    behaviour = "steps=12 save=4 step_seconds=0.1 crash=11 once parent"
    job = running.wait(running.submit(behaviour, model=f"{parent.fine_tuned_model}:ckpt-step-2"))

    assert job.status == "succeeded", job.error
    assert [row.outcome for row in running.attempts(job.id)] == ["crashed", "succeeded"]
    messages = [event.message for event in running.events(job.id)]
    assert "Resuming from the checkpoint of step 8" in messages
    assert f"It goes on from {parent.fine_tuned_model}:ckpt-step-2" in messages


def test_a_parent_that_went_away_before_the_start_ends_the_job_with_the_reason(running: Stack) -> None:
    parent = tuned(running)
    blocker = running.submit("steps=10 hold=2")  # until it is cancelled
    running.wait(blocker, "running")
    job_id = running.submit("steps=2", model=parent.fine_tuned_model)
    running.wait(job_id, "queued")
    withdraw(parent, running)
    running.cancel(blocker)
    job = running.wait(job_id)

    assert job.status == "failed"
    assert (job.error["code"], job.error["param"]) == ("parent_gone", "model")
    assert parent.fine_tuned_model in job.error["message"]
    assert job.attempts == 1


def test_weights_that_are_not_what_was_published_start_no_training(running: Stack) -> None:
    parent = tuned(running)
    key = f"{parent.manifest['prefix']}/adapter_config.json"
    published = running.read(key)
    running.store.put_bytes(key, b'{"peft_type": "OTHER"}')
    job = running.wait(running.submit("steps=2", model=parent.fine_tuned_model))
    running.store.put_bytes(key, published)

    assert job.status == "failed"
    assert "not what was published" in job.error["message"]
