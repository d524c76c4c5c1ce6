from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.contract.events import EXIT_DONE, EXIT_STOPPED
from tests.patience import patience
from tests.train.interrupted import interrupt
from tests.train.tiny import chat, chat_rows, losses, make_spec, read_events, run
from worker.train import checkpoints, loop
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

STEPS = 6  # two epochs of twelve rows by four


def weights(out: Path) -> dict:
    return {name: tensor.tolist() for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_interrupted_run_ends_with_the_same_curve_and_weights_as_one_that_was_not(
    model: Path, tmp_path: Path, method: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model": model,
        "validation": chat_rows(3),
        "adapter": {"method": method, "lora_dropout": 0.1},
        "training": {"packing": packing, "optim": "paged_adamw_8bit", "warmup_ratio": 0.5},
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    after = random.randrange(1, STEPS)

    assert run(make_spec(whole, **settings), whole / "out")[0] == EXIT_DONE
    interrupt(make_spec(broken, **settings), broken / "out", after=after, monkeypatch=monkeypatch)
    assert run(broken / "spec.json", broken / "out")[0] == EXIT_DONE

    events = read_events(broken / "out")
    assert [event.first_step for event in events if event.type == "started"] == [0, after]
    assert losses(events) == losses(read_events(whole / "out"))
    assert weights(broken / "out") == weights(whole / "out")
    assert events[-1].trained_tokens == read_events(whole / "out")[-1].trained_tokens


def test_an_interruption_amid_a_logging_interval_loses_no_figure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": model, "training": {"save_steps": 2, "logging_steps": 1}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    run(make_spec(whole, **settings), whole / "out")
    interrupt(make_spec(broken, **settings), broken / "out", after=3, monkeypatch=monkeypatch)
    run(broken / "spec.json", broken / "out")

    assert set(losses(read_events(broken / "out"))) == set(range(1, STEPS + 1))


def test_a_run_goes_on_at_half_the_micro_batch_with_the_same_curve(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": model, "training": {"packing": False}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    run(make_spec(whole, **settings), whole / "out")
    interrupt(make_spec(broken, **settings), broken / "out", after=2, monkeypatch=monkeypatch)
    run(make_spec(broken, micro_batch_size=2, gradient_checkpointing=True, **settings), broken / "out")

    assert losses(read_events(broken / "out")) == pytest.approx(losses(read_events(whole / "out")), rel=1e-4)


@pytest.mark.parametrize(
    ("after_seconds", "steps"),
    [(0.0, [1, 2, 3, 4, 5, 6]), (loop.SAVE_SECONDS, [3, 6])],
    ids=["at once", "later"],
)
def test_a_long_epoch_has_checkpoints_by_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_seconds: float, steps: list[int]
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", after_seconds)
    monkeypatch.setattr(loop, "SAVE_SHARE", float("inf"))  # however long saving takes

    code, events = run(make_spec(tmp_path, model=model), tmp_path / "out")

    assert code == EXIT_DONE
    assert [event.step for event in events if event.type == "checkpoint"] == steps


def test_saving_takes_a_twentieth_of_the_time_at_most(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e-9)  # each save was a long one, beside this run

    _, events = run(make_spec(tmp_path, model=model), tmp_path / "out")

    assert [event.step for event in events if event.type == "checkpoint"] == [1, 3, 6]


@pytest.fixture(scope="module")
def ended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with checkpoints of its last two epochs."""
    folder = tmp_path_factory.mktemp("ended")
    before = signal.getsignal(signal.SIGTERM)
    run(make_spec(folder, model=model, training={"num_train_epochs": 3}), folder / "out")
    signal.signal(signal.SIGTERM, before)
    return folder


@pytest.fixture
def stopped(ended: Path, tmp_path: Path) -> Path:
    """A copy of that run's OUT."""
    return shutil.copytree(ended / "out", tmp_path / "out")


@pytest.mark.parametrize("damage", ["a byte flipped", "a file gone", "no manifest", "another job's", "a path outside"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(stopped: Path, damage: str) -> None:
    folder = stopped / "checkpoints"
    newest = folder / "step-00000009"
    assert checkpoints.newest_intact(folder, job_id="ftjob-tiny") == newest
    manifest = json.loads((newest / "manifest.json").read_text())

    if damage == "a byte flipped":
        state = bytearray((newest / "state.safetensors").read_bytes())
        state[-1] ^= 1
        (newest / "state.safetensors").write_bytes(state)
    elif damage == "a file gone":
        (newest / "adapter" / "adapter_model.safetensors").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "another job's":
        (newest / "manifest.json").write_text(json.dumps({**manifest, "job_id": "ftjob-other"}))
    else:
        manifest["files"].append({"name": "../../events.jsonl", "bytes": 1, "sha256": "0"})
        (newest / "manifest.json").write_text(json.dumps(manifest))

    assert checkpoints.newest_intact(folder, job_id="ftjob-tiny") == folder / "step-00000006"


def test_a_checkpoint_holds_no_pickle_and_its_own_loadable_adapter(stopped: Path) -> None:
    files = [file.relative_to(stopped).as_posix() for file in (stopped / "checkpoints").rglob("*") if file.is_file()]

    assert {Path(file).suffix for file in files} == {".safetensors", ".json", ".md"}
    assert "checkpoints/step-00000009/adapter/adapter_config.json" in files


@pytest.mark.parametrize("noted", [{"step": 7}, {"step": 7, "looked_step": 6, "of_a_newer_version": True}])
def test_progress_of_an_older_or_newer_version_is_read_as_far_as_it_is_known(tmp_path: Path, noted: object) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"progress": noted}))

    assert checkpoints.read_progress(tmp_path).step == 7


def test_the_newest_two_checkpoints_and_the_best_are_kept(model: Path, tmp_path: Path) -> None:
    # Validation on what training unlearns: the first look stays the best.
    spec = make_spec(
        tmp_path,
        model=model,
        rows=[chat("who?", "me")] * 4,
        validation=[chat("who?", "zzzz")],
        training={"num_train_epochs": 12, "learning_rate": 0.02},
    )

    _, events = run(spec, tmp_path / "out")

    best = events[-1].published_step
    kept = {int(place.name[-8:]) for place in (tmp_path / "out" / "checkpoints").iterdir()}
    assert best < 11
    assert kept == {best, 11, 12}


def test_a_finished_run_that_is_started_again_publishes_the_same_adapter(ended: Path, stopped: Path) -> None:
    before = weights(stopped)
    shutil.rmtree(stopped / "adapter")

    code, events = run(ended / "spec.json", stopped)

    assert code == EXIT_DONE
    assert events[-1].type == "finished"
    assert weights(stopped) == before


def test_a_torn_last_event_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"time": 1.0, "type": "mess')

    Reporter(file, clock=lambda: 2.0).say("whole")

    assert json.loads(file.read_text().splitlines()[1])["message"] == "whole"


def test_sigterm_ends_the_program_with_a_complete_checkpoint(model: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, model=model, training={"num_train_epochs": 50})
    out = tmp_path / "out"
    trainer = subprocess.Popen([sys.executable, "-m", "worker.train", str(spec), str(out)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + patience(120)
    while not (out / "events.jsonl").exists() or b'"metrics"' not in (out / "events.jsonl").read_bytes():
        assert trainer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)

    trainer.send_signal(signal.SIGTERM)
    _, errors = trainer.communicate(timeout=patience(60))

    assert trainer.returncode == EXIT_STOPPED, errors
    last = read_events(out)[-1]
    assert last.type == "checkpoint"
    assert checkpoints.newest_intact(out / "checkpoints", job_id="ftjob-tiny") == out / "checkpoints" / last.name


def test_a_checkpoint_holds_the_scale_of_float16s_losses(tmp_path: Path) -> None:
    def learner(scale: float | None) -> checkpoints.TrainingState:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        return checkpoints.TrainingState(model, optimizer, scheduler, scaler)

    def saved(one: checkpoints.TrainingState, name: str) -> Path:
        progress, ranks = checkpoints.Progress(step=1), Ranks()
        taken = checkpoints.taken(
            tmp_path / name, learner=one, progress=progress, job_id="j", write_adapter=Path.mkdir, ranks=ranks
        )
        assert taken is not None
        return taken.written()

    fresh, older = learner(65536.0), learner(65536.0)
    checkpoints.restore(saved(learner(512.0), "scaled"), fresh)
    checkpoints.restore(saved(learner(None), "without"), older)

    assert (fresh.scaler.get_scale(), older.scaler.get_scale()) == (512.0, 65536.0)
