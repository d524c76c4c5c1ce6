"""An error of the training libraries that would come again ends the job; a crash after progress does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import EXIT_USER_FAULT
from tests.train.tiny import make_model_directory, make_spec, run
from worker.train import loop

SHAPES = "mat1 and mat2 shapes cannot be multiplied (4x3 and 2x4)"


def test_a_base_that_the_libraries_cannot_build_ends_the_job_with_their_last_line(tmp_path: Path) -> None:
    base = make_model_directory(tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_activation"}))

    code, events = run(make_spec(tmp_path, model=base), tmp_path / "out")

    assert (code, events[-1].code) == (EXIT_USER_FAULT, "training_stack_failed")
    assert "while loading the base model" in events[-1].message
    assert "KeyError" in events[-1].message
    assert "no_such_activation" in events[-1].message


def _failing_at(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = loop._accumulate

    def accumulate(run: Any, rows: Any) -> Any:
        if run.progress.step == step:
            raise error
        return genuine(run, rows)

    monkeypatch.setattr(loop, "_accumulate", accumulate)


def test_shapes_that_do_not_fit_in_the_first_step_end_the_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing_at(0, RuntimeError(SHAPES), monkeypatch)

    code, events = run(make_spec(tmp_path, model=model), tmp_path / "out")

    assert (code, events[-1].code) == (EXIT_USER_FAULT, "training_stack_failed")
    assert f"RuntimeError: {SHAPES}" in events[-1].message


@pytest.mark.parametrize(
    ("step", "error"), [(1, RuntimeError(SHAPES)), (0, RuntimeError("CUDA error: unspecified launch failure"))]
)
def test_a_crash_after_progress_or_of_the_device_is_tried_again(
    step: int, error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing_at(step, error, monkeypatch)

    with pytest.raises(RuntimeError, match=r"mat1|CUDA"):
        run(make_spec(tmp_path, model=model), tmp_path / "out")
