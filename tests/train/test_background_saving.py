"""Checkpoints that a thread brings to the disk while training goes on, as on GPUs; here the road is forced on a CPU."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.contract.events import EXIT_DONE, EXIT_STOPPED, Metrics
from shared.contract.spec import AttemptSpec
from tests.patience import patience
from tests.train.interrupted import StopAfter
from tests.train.tiny import losses, make_spec, read_events, run
from worker.train import __main__ as program
from worker.train import checkpoints, loop
from worker.train.reporting import Reporter

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

STEPS = 6  # two epochs of twelve rows by four
SETTINGS: dict[str, Any] = {
    "adapter": {"method": "lora", "lora_dropout": 0.1},
    "training": {"save_steps": 2, "logging_steps": 1, "warmup_ratio": 0.5},
}


def weights(folder: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def saved(out: Path) -> list[int]:
    return [event.step for event in read_events(out) if event.type == "checkpoint"]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run that saved between its steps, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "prune", lambda _folder, **_: None)
        assert run(make_spec(folder, model=model, **SETTINGS), folder / "out")[0] == EXIT_DONE
    return folder / "out"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "saves_beside_steps", lambda _spec: True)


class SlowDisk:
    """Completes the checkpoint of a step only once the metrics of a later one are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, first: int, until: int) -> None:
        later, waited_in = threading.Event(), list[str]()
        self.waited_in = waited_in
        settle = checkpoints.settle

        def slow(unfinished: Path, *, place: Path) -> None:
            if place.name == checkpoints.folder_name(first):
                waited_in.append(threading.current_thread().name)
                assert later.wait(patience(60)), "training waits for the disk"
            settle(unfinished, place=place)

        class Told(Reporter):
            def write(self, event: Any, **fields: Any) -> None:
                super().write(event, **fields)
                if event is Metrics and fields["step"] == until:
                    later.set()

        monkeypatch.setattr(checkpoints, "settle", slow)
        monkeypatch.setattr(program, "Reporter", Told)


def test_steps_go_on_while_a_checkpoint_is_written_and_nothing_of_it_changes(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    monkeypatch.setattr(checkpoints, "prune", lambda _folder, **_: None)
    disk = SlowDisk(monkeypatch, first=2, until=4)
    out = tmp_path / "out"

    code, events = run(make_spec(tmp_path, model=model, **SETTINGS), out)

    assert code == EXIT_DONE
    assert disk.waited_in
    assert disk.waited_in[0].startswith("checkpoint")
    kinds = [(event.type, event.step) for event in events if event.type in {"metrics", "checkpoint"}]
    assert kinds.index(("metrics", 4)) < kinds.index(("checkpoint", 2)) < kinds.index(("checkpoint", 4))
    assert losses(events) == losses(read_events(whole))
    for step in saved(whole):
        name = checkpoints.folder_name(step)
        ours, theirs = out / "checkpoints" / name, whole / "checkpoints" / name
        assert checkpoints.is_intact(ours, job_id="ftjob-tiny")
        assert weights(ours / "adapter") == weights(theirs / "adapter")
        assert (ours / "state.safetensors").read_bytes() == (theirs / "state.safetensors").read_bytes()
    assert weights(out / "adapter") == weights(whole / "adapter")


def test_a_run_goes_on_from_a_checkpoint_that_was_written_meanwhile(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    SlowDisk(monkeypatch, first=4, until=5)
    spec, out = make_spec(tmp_path, model=model, **SETTINGS), tmp_path / "out"
    run(spec, out)
    for left in (out / "checkpoints" / checkpoints.folder_name(STEPS), out / "adapter"):
        shutil.rmtree(left)

    code, events = run(spec, out)

    assert code == EXIT_DONE
    assert [event.first_step for event in events if event.type == "started"] == [0, 4]
    assert weights(out / "adapter") == weights(whole / "adapter")


def test_a_crash_within_the_writing_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    spec, out = make_spec(tmp_path, model=model, **SETTINGS), tmp_path / "out"
    argv = [sys.executable, "-m", "tests.train.killed_while_saving", str(spec), str(out), "4"]
    killed = subprocess.run(argv, capture_output=True, text=True, timeout=patience(180), check=False)

    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert 5 in losses(read_events(out)), "it was killed while a later step was done"
    assert saved(out) == [2]
    newest = checkpoints.newest_intact(out / "checkpoints", job_id="ftjob-tiny")
    assert newest == out / "checkpoints" / checkpoints.folder_name(2)
    assert run(spec, out)[0] == EXIT_DONE
    assert losses(read_events(out)) == losses(read_events(whole))
    assert weights(out / "adapter") == weights(whole / "adapter")


def test_a_stop_waits_for_what_is_being_written_and_tells_both_in_order(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(StopAfter, "step", 3)
    monkeypatch.setattr(StopAfter, "out", out, raising=False)
    monkeypatch.setattr(program, "Reporter", StopAfter)

    code, events = run(make_spec(tmp_path, model=model, **SETTINGS), out)

    assert code == EXIT_STOPPED
    assert saved(out) == [2, 3]
    assert events[-1].type == "checkpoint"
    assert checkpoints.newest_intact(out / "checkpoints", job_id="ftjob-tiny") == out / "checkpoints" / events[-1].name


def test_a_disk_that_is_full_ends_the_run_with_the_checkpoint_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    settle = checkpoints.settle

    def full(unfinished: Path, *, place: Path) -> None:
        if place.name == checkpoints.folder_name(4):
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(unfinished, place=place)

    monkeypatch.setattr(checkpoints, "settle", full)
    out = tmp_path / "out"

    with pytest.raises(OSError, match="No space left"):
        run(make_spec(tmp_path, model=model, **SETTINGS), out)

    assert saved(out) == [2]
    assert checkpoints.newest_intact(out / "checkpoints", job_id="ftjob-tiny") == out / "checkpoints" / "step-00000002"


def test_memory_that_runs_out_meanwhile_loses_no_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    """The next attempt, with smaller passes, goes on from it."""
    one_step = loop._one_step

    def short(attempt: loop.TrainingRun) -> None:
        if attempt.progress.step == 4:
            raise MemoryError
        one_step(attempt)

    monkeypatch.setattr(loop, "_one_step", short)
    out = tmp_path / "out"

    run(make_spec(tmp_path, model=model, **SETTINGS), out)

    assert [event.type for event in read_events(out)][-2:] == ["checkpoint", "failed"]
    assert saved(out) == [2, 4]


def cases() -> Iterator[tuple[str, dict[str, Any], bool]]:
    yield "a GPU", {"device": "cuda"}, True
    yield "the road left out", {"device": "cuda", "without": ["background_saving"]}, False
    yield "all weights train", {"device": "cuda", "adapter": {"method": "full"}}, False
    yield "a processor", {"device": "cpu"}, False


@pytest.mark.parametrize(("parts", "beside_steps"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_a_gpu_saves_adapters_beside_its_steps(
    model: Path, tmp_path: Path, parts: dict[str, Any], beside_steps: bool
) -> None:
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model, **parts).read_bytes())

    assert loop.saves_beside_steps(spec) is beside_steps
