"""The life of a job with real processes: bell, claim, trainer, store, end."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.jobs import moves, trainer_log
from shared.store.db import session_scope
from shared.store.tables import CheckpointRow, DeviceRow, FileRow
from tests.lifecycle.stack import Stack, chain_of, until
from tests.patience import lease


def messages(stack: Stack, job_id: str) -> list[str]:
    return [event.message for event in stack.events(job_id)]


def result_of(stack: Stack, job_id: str) -> str:
    with Session(stack.engine) as session:
        return stack.read(session.get_one(FileRow, stack.job(job_id).result_file).key).decode()


def test_a_submitted_job_is_trained_published_and_succeeds(running: Stack) -> None:
    job = running.wait(running.submit("steps=10 save=5"))

    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny:acme::{job.id.removeprefix('ftjob-')}"
    assert job.trained_tokens == 100
    assert {file["name"] for file in job.manifest["files"]} == {"adapter_config.json", "chain.json"}
    assert running.chain(job.manifest) == chain_of(10)
    assert messages(running, job.id)[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]


def test_clients_read_every_step_as_a_metrics_event_and_the_newest_as_progress(running: Stack) -> None:
    job = running.wait(running.submit("steps=6 save=3"))

    steps = [event for event in running.events(job.id) if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[3].message == "Step 4/6: training loss=0.25"
    assert job.progress["step"] == job.progress["total_steps"] == 6


def test_the_result_file_has_one_line_per_step(running: Stack) -> None:
    job = running.wait(running.submit("steps=3"))

    with Session(running.engine) as session:
        file = session.get_one(FileRow, job.result_file)
    content = running.read(file.key)
    assert file.purpose == "fine-tune-results"
    assert hashlib.sha256(content).hexdigest() == file.sha256
    assert content.decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,1.0,,,",
        "2,0.5,,,",
        "3,0.3333333333333333,,,",
    ]


def test_every_checkpoint_is_published_with_its_files(running: Stack) -> None:
    job = running.wait(running.submit("steps=9 save=3"))

    with Session(running.engine) as session:
        found = session.scalars(
            select(CheckpointRow).where(CheckpointRow.job_id == job.id).order_by(CheckpointRow.step)
        ).all()
    assert [(row.step, row.name) for row in found] == [(s, f"{job.fine_tuned_model}:ckpt-step-{s}") for s in (3, 6, 9)]
    state = json.loads(running.read(f"{found[1].manifest['prefix']}/state.json"))
    assert state == {"step": 6, "chain": chain_of(6)}


def test_a_trainer_that_blames_the_user_fails_the_job_with_its_words_at_once(running: Stack) -> None:
    job = running.wait(running.submit("user_fault"))

    assert job.status == "failed"
    assert job.error == {"code": "data_error", "message": "Row 3 cannot be rendered.", "param": "training_file"}
    assert job.attempts == 1


def test_a_crash_is_tried_again_from_the_last_checkpoint_with_the_same_result(running: Stack) -> None:
    # It crashes as soon as the checkpoint is whole, so nobody can have uploaded that before.
    job = running.wait(running.submit("steps=12 save=4 step_seconds=0 crash=9 once"))

    assert job.status == "succeeded", job.error
    assert [row.outcome for row in running.attempts(job.id)] == ["crashed", "succeeded"]
    assert "Resuming from the checkpoint of step 8" in messages(running, job.id)
    assert running.chain(job.manifest) == chain_of(12)
    assert len(result_of(running, job.id).splitlines()) == 1 + 12


def test_a_job_that_crashes_every_time_fails_after_its_attempts(running: Stack) -> None:
    job = running.wait(running.submit("steps=12 crash=3"))

    assert job.status == "failed"
    assert job.error["code"] == "trainer_crashed"
    assert "exit code 1" in job.error["message"]
    assert "attempt 3 of 3" in job.error["message"]
    assert [row.outcome for row in running.attempts(job.id)] == ["crashed"] * 3


@pytest.mark.parametrize(
    ("fits", "outcomes"), [(4, ["out_of_memory", "succeeded"]), (2, ["out_of_memory"] * 2 + ["succeeded"])]
)
def test_out_of_memory_halves_the_rows_per_pass_and_uses_up_no_attempt(
    running: Stack, fits: int, outcomes: list[str]
) -> None:
    training = {"per_device_train_batch_size": 8, "batch_size": 8, "packing": False}
    job = running.wait(running.submit(f"steps=4 fits={fits}", training=training))

    assert job.status == "succeeded", job.error
    assert job.micro_batch_size == fits
    assert job.failures == 0
    assert [row.outcome for row in running.attempts(job.id)] == outcomes


def test_out_of_memory_with_nothing_left_to_save_fails_with_the_remedy(running: Stack) -> None:
    job = running.wait(running.submit("fits=0", training={"per_device_train_batch_size": 1}))

    assert job.status == "failed"
    assert job.error["code"] == "gpu_oom"
    assert "max_length" in job.error["message"]
    assert re.search(r"8.0 GiB .*: \d\.\d GiB were estimated, 7\.5 GiB were held", job.error["message"])
    assert len(running.attempts(job.id)) == 2  # once plain, once with gradient checkpointing


def test_cancel_ends_a_running_trainer_and_frees_its_device(running: Stack) -> None:
    job_id = running.submit("steps=1000 step_seconds=0.05")
    running.wait_for_step(job_id, 1)

    running.cancel(job_id)
    job = running.wait(job_id)

    assert job.status == "cancelled"
    assert running.trainers() == []
    with Session(running.engine) as session:
        assert session.scalars(select(DeviceRow.leased_by)).all() == [None]


def test_a_trainer_that_ignores_every_request_is_killed(running: Stack) -> None:
    job_id = running.submit("steps=1000 step_seconds=0.05 ignore_term ignore_stop daemon")
    running.wait_for_step(job_id, 1)

    running.cancel(job_id)

    assert running.wait(job_id).status == "cancelled"
    assert running.trainers() == []


def log_of(stack: Stack, job_id: str, number: int = 1) -> tuple[str, str]:
    """How much of an attempt's log is known, and what."""
    with Session(stack.engine) as session:
        log = trainer_log.of_attempt(session, stack.job(job_id), number=number)
        parts = trainer_log.pieces(session, job_id, log.fence)
    if log.stored is not None:
        parts = trainer_log.parts_of(log.stored, stack.read(log.stored.key))
    return log.state, trainer_log.joined(parts)


def test_what_a_trainer_prints_is_read_while_it_runs_and_after_a_cancel_without_its_secrets(running: Stack) -> None:
    secret = "sk-" + "abcdefghij" * 3
    job_id = running.submit(f"steps=1000 step_seconds=0.05 print=loaded_with_{secret}")
    until(lambda: log_of_started(running, job_id)[1], what="the first line of the log")

    assert log_of(running, job_id) == ("live", "loaded with [hidden]\n")

    with session_scope(running.engine) as session:
        moves.request_cancel(session, job_id, project_id=running.caller.project_id)
    assert running.wait(job_id).status == "cancelled"
    until(lambda: log_of(running, job_id)[0] == "stored", what="the log in the store")
    assert log_of(running, job_id) == ("stored", "loaded with [hidden]\n")


def log_of_started(stack: Stack, job_id: str) -> tuple[str, str]:
    return log_of(stack, job_id) if stack.attempts(job_id) else ("", "")


def test_the_log_of_each_attempt_that_crashed_is_kept(running: Stack) -> None:
    job = running.wait(running.submit("steps=3 crash=2 print=before_the_end"))

    assert job.status == "failed"
    for number in (1, 2, 3):
        until(lambda number=number: log_of(running, job.id, number)[0] == "stored", what="a log in the store")
        assert log_of(running, job.id, number)[1] == "before the end\n"
    assert not list((running.settings.home / "logs").glob("*/head"))


def test_what_a_trainer_forked_away_dies_with_it(running: Stack) -> None:
    job = running.wait(running.submit("steps=2 daemon"))

    assert job.status == "succeeded"
    assert running.trainers() == []


def test_pause_keeps_a_checkpoint_and_resume_goes_on_to_the_same_result(running: Stack) -> None:
    job_id = running.submit("steps=40 step_seconds=0.05 save=1000 hold=20 once")
    running.wait_for_step(job_id, 3)
    with session_scope(running.engine) as session:
        moves.request_pause(session, job_id, project_id=running.caller.project_id)
    paused = running.wait(job_id, "paused")
    stopped_at = paused.last_checkpoint["step"]

    with session_scope(running.engine) as session:
        moves.resume(session, job_id, project_id=running.caller.project_id)
    job = running.wait(job_id)

    assert job.status == "succeeded", job.error
    assert 3 <= stopped_at < 40
    assert f"Resuming from the checkpoint of step {stopped_at}" in messages(running, job_id)
    assert running.chain(job.manifest) == chain_of(40)
    assert [row.outcome for row in running.attempts(job_id)] == ["paused", "succeeded"]


def test_two_jobs_take_turns_on_one_device(running: Stack) -> None:
    first, second = running.submit("steps=5"), running.submit("steps=5")

    ended = [running.wait(job_id) for job_id in (first, second)]

    assert [job.status for job in ended] == ["succeeded", "succeeded"]
    one, two = (running.attempts(job_id)[0] for job_id in (first, second))
    assert two.started_at >= one.ended_at or one.started_at >= two.ended_at


def test_a_flood_of_events_is_cut_with_a_note_and_costs_no_heartbeat(running: Stack) -> None:
    job = running.wait(running.submit("steps=40 flood=500"))

    told = messages(running, job.id)
    assert job.status == "succeeded", job.error
    assert len(told) < 5_000
    assert any("events left out" in message for message in told)
    assert job.failures == 0


def test_a_file_with_faults_fails_its_job_naming_line_column_and_remedy_before_any_device(running: Stack) -> None:
    job = running.wait(running.submit_file(running.upload(b'{"text": "good"}\n{"text": 7}\n{"text": "cut of')))

    assert job.status == "failed"
    assert job.error["param"] == "training_file"
    assert "line 2" in job.error["message"]
    assert "line 3" in job.error["message"]
    assert running.attempts(job.id) == []


def test_a_model_that_could_run_code_is_refused_without_a_retry(running: Stack) -> None:
    code = running.home / "tiny" / "modeling.py"
    code.write_text("raise SystemExit")
    try:
        job = running.wait(running.submit("steps=2"))
    finally:
        code.unlink()

    assert job.status == "failed"
    assert job.error["code"] == "base_model_refused"
    assert "modeling.py" in job.error["message"]
    assert job.attempts == 1


def test_a_changed_training_file_is_noticed(running: Stack) -> None:
    file_id = running.upload(b'{"text": "fake: steps=2"}\n' * 3)
    with session_scope(running.engine) as session:
        session.get_one(FileRow, file_id).sha256 = "0" * 64

    job = running.wait(running.submit_file(file_id))

    assert job.status == "failed"
    assert job.error["code"] == "file_changed"


def test_a_stuck_trainer_leaves_its_stack_and_is_tried_again(stack: Stack) -> None:
    # Long enough for a busy machine to start the interpreter: a trainer stuck in its imports has no stack to show.
    stack.start_worker(TUNEPOOL_STALL_FLOOR_SECONDS=lease(5), TUNEPOOL_MAX_ATTEMPTS="1")
    job = stack.wait(stack.submit("steps=9 hang=2"))

    assert job.status == "failed"
    assert job.error["code"] == "trainer_stalled"
    log = (stack.home / "worker-home.log").read_text()
    assert "fake_trainer.py" in log
    assert "most recent call first" in log
    assert until(lambda: stack.trainers() == [])
