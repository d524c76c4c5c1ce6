"""The documents that rows keep are read and written by one class each, and keep their shape."""

from __future__ import annotations

import pytest
from annotated_types import Le
from pydantic import ValidationError

from shared.contract.documents import JobError, JobProgress, Manifest, ManifestEntry, error_document
from shared.contract.events import CheckpointSaved, Metrics
from shared.contract.preflight_report import CheckedFile, Report
from shared.fleet import workers
from shared.settings import Settings
from worker.program.trainer_events import EventsSoFar

ENTRY = {"name": "adapter/model.safetensors", "bytes": 3, "sha256": "ab"}


def test_an_error_always_says_which_field_it_is_about_or_that_it_is_about_none() -> None:
    assert error_document("data_changed", "No.") == {"code": "data_changed", "message": "No.", "param": None}
    assert error_document("a", "b", param="model")["param"] == "model"


def test_a_manifest_of_a_product_has_no_step_and_one_of_a_checkpoint_has() -> None:
    files = (ManifestEntry(name="a/b", bytes=1, sha256="c"),)
    product = Manifest(prefix="p", files=files)
    checkpoint = Manifest(prefix="p", files=files, name="step-3", step=3)

    assert product.document() == {"prefix": "p", "files": [{"name": "a/b", "bytes": 1, "sha256": "c"}]}
    assert Manifest.read(checkpoint.document()) == checkpoint
    assert product.key(files[0]) == "p/a/b"


@pytest.mark.parametrize("cls", [JobError, Manifest, CheckedFile])
def test_a_document_of_a_newer_version_is_read_without_what_is_new(cls: type) -> None:
    known = {"code": "a", "message": "b", "prefix": "p", "files": [ENTRY], "id": "file-1"}

    assert cls.read({**known, "of_a_newer_version": 1}) == cls.read(known)


def test_a_manifest_that_names_no_place_is_an_error() -> None:
    with pytest.raises(ValidationError, match="prefix"):
        Manifest.read({"files": [ENTRY]})


def step_of(seconds: float) -> Metrics:
    known = {"time": 0.0, "step": 2, "total_steps": 10, "epoch": 0.5, "train_loss": 1.0, "learning_rate": 1e-4}
    return Metrics(**known, trained_tokens=100, seconds_per_step=seconds)


def test_a_trainer_with_long_steps_has_time_to_end_one_and_to_save_before_it_is_killed() -> None:
    quick, slow = EventsSoFar(clock=lambda: 0.0), EventsSoFar(clock=lambda: 0.0)
    unheard = quick.until_stopped(floor_seconds=30)
    quick.hear(step_of(3.0))
    slow.hear(step_of(90.0))

    assert (unheard, quick.until_stopped(floor_seconds=30), slow.until_stopped(floor_seconds=30)) == (30, 30, 180)
    quick.hear(CheckpointSaved(time=0.0, step=2, name="step-00000002", save_seconds=200.0))
    assert quick.until_stopped(floor_seconds=30) == 406, "its disk is slow"


def test_the_plan_reads_how_long_a_job_still_takes_and_never_fails_for_one_that_does_not_say() -> None:
    story = EventsSoFar(clock=lambda: 0.0)
    assert story.progress() is None
    story.hear(
        Metrics(
            time=0.0,
            step=2,
            total_steps=10,
            epoch=0.5,
            train_loss=1.0,
            learning_rate=1e-4,
            trained_tokens=100,
            seconds_per_step=3.0,
        )
    )
    progress = story.progress()

    assert isinstance(progress, JobProgress)
    assert JobProgress.left(progress.document()) == 24.0
    assert progress.document()["valid_loss"] is None
    assert JobProgress.left(None) is JobProgress.left({}) is JobProgress.left({"seconds_left": None}) is None


def test_a_worker_cannot_be_set_to_report_so_seldom_that_the_plan_loses_its_devices_in_between() -> None:
    slowest = next(one.le for one in Settings.model_fields["heartbeat_seconds"].metadata if isinstance(one, Le))

    assert 2 * float(str(slowest)) <= workers.SILENCE.total_seconds()
    with pytest.raises(ValidationError, match="heartbeat_seconds"):
        Settings(heartbeat_seconds=61)


def test_a_preflight_that_ends_early_keeps_only_what_it_knows() -> None:
    report = Report(ok=False, files={}, refusal=JobError(code="a", message="b"))

    assert report.document() == {"ok": False, "files": {}, "refusal": {"code": "a", "message": "b"}}
