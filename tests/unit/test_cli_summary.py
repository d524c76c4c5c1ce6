"""What `tunepool jobs show` says of a job to a person."""

from __future__ import annotations

from typing import Any

from openai.types.fine_tuning import FineTuningJob
from tunepool.summary import of_job

JOB = "ftjob-0193a1b2c3d4e5f60718293a4b5c6d7e"


def job(status: str, *, extension: dict[str, Any] | None = None, **values: Any) -> FineTuningJob:
    usual = {
        "id": JOB,
        "object": "fine_tuning.job",
        "created_at": 0,
        "model": "smollm2-135m-instruct",
        "training_file": "file-1",
        "organization_id": "org_1",
        "result_files": [],
        "hyperparameters": {},
        "seed": 1,
        "status": status,
        "tunepool": extension or {},
    }
    return FineTuningJob.model_validate({**usual, **values})


def test_a_waiting_job_says_where_and_why() -> None:
    queue = {"position": 3, "blocked_by": "NO_FREE_DEVICE", "detail": "Two run.", "eta_low": 0, "eta_high": 3600}
    text = of_job(job("queued", extension={"queue": queue}, metadata={"team": "a"}))

    assert "queued: place 3, NO_FREE_DEVICE, starts 00:00 to 01:00Z" in text
    assert "because   Two run." in text
    assert "team=a" in text
    assert "progress" not in text
    assert "error" not in text


def test_a_running_job_says_how_far_it_is_and_what_was_asked_of_it() -> None:
    progress = {"step": 40, "total_steps": 96, "train_loss": 0.5, "valid_loss": 0.25, "seconds_left": 90}
    text = of_job(job("running", extension={"progress": progress, "usage": {"device_seconds": 12.34}}))
    cancelled = of_job(job("running", extension={"cancel_requested_at": 1}))

    assert "step 40 of 96, loss 0.5000, validation loss 0.2500, 1:30 left" in text
    assert "12.3 device-seconds" in text
    assert "running, is being cancelled" in cancelled
    assert "is to be paused" in of_job(job("validating_files", extension={"pause_requested_at": 1}))


def test_an_ended_job_says_what_became_of_it() -> None:
    good = of_job(job("succeeded", fine_tuned_model="ft:a:b::c", finished_at=60, validation_file="file-2"))
    bad = of_job(job("failed", error={"code": "too_few_rows", "message": "3 rows.", "param": "training_file"}))

    assert "ft:a:b::c" in good
    assert "file-1, file-2" in good
    assert "1970-01-01 00:01:00Z" in good
    assert "3 rows. (too_few_rows)" in bad
    trackings = [
        {
            "type": "wandb",
            "state": "waiting",
            "url": None,
            "file": None,
            "last_step": None,
            "error": "403 of api.wandb.ai",
        },
        {"type": "mlflow", "state": "done", "url": "https://ml/1", "file": None, "last_step": 96, "error": None},
    ]
    tracked = of_job(job("succeeded", extension={"integrations": trackings}))
    assert "waiting, 403 of api.wandb.ai" in tracked
    assert "done, to step 96, https://ml/1" in tracked
    assert bad.splitlines()[0].split() == ["job", JOB]
