"""Jobs that train in turn on one base get, bit for bit, what each gets alone; an end of one is its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.contract import cotraining
from shared.contract.cotraining import CotrainingSpec, TraineeEnd
from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT, Metrics
from shared.contract.spec import AttemptSpec, Quantization
from shared.settings import trainer_environment
from tests.patience import patience
from tests.train.tiny import chat, chat_rows, make_spec, preference_rows, read_events, run, steps_told
from worker.train import together
from worker.train.base_model import four_bit, load_frozen
from worker.train.initialisation import MUTATING_INITS
from worker.train.loop import TrainingRun
from worker.train.memory import Peaks
from worker.train.objectives.objective import Loss, MicroBatch
from worker.train.objectives.supervised import SupervisedObjective
from worker.train.ranks import Ranks
from worker.train.reporting import SIGN_SECONDS, Reporter, TraineeReporter
from worker.train.shared_base import tree_over
from worker.train.stopping import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

Jobs = dict[str, dict[str, Any]]

# Unlike in everything that may be unlike.
UNLIKE: Jobs = {
    "ftjob-plain": {"rows": chat_rows(12)},
    "ftjob-dropout": {
        "rows": chat_rows(9),
        "validation": chat_rows(5),
        "adapter": {"r": 8, "lora_dropout": 0.2, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "training": {"optim": "paged_adamw_8bit", "warmup_ratio": 0.5, "eval": {"steps": 1}, "packing": False},
        "seed": 5,
    },
    "ftjob-noisy": {
        "rows": chat_rows(6),
        "validation": chat_rows(3),
        "adapter": {"init_lora_weights": "gaussian", "loraplus_lr_ratio": 4.0, "lora_dropout": 0.1},
        "training": {"num_train_epochs": 3, "batch_size": 3, "neftune_noise_alpha": 5.0},
        "seed": 5,
        "gradient_checkpointing": True,
    },
}


def write_trainees(folder: Path, jobs: Jobs, *, model: Path, method: str = "lora", **common: Any) -> dict[str, Path]:
    """Spec files of the jobs, by id."""
    return {
        job_id: _write(folder / job_id, job_id, job, model=model, method=method, **common)
        for job_id, job in jobs.items()
    }


def _write(folder: Path, job_id: str, job: dict[str, Any], *, model: Path, method: str, **common: Any) -> Path:
    settings = {**common, **job, "adapter": {"method": method, **job.get("adapter", {})}, "job_id": job_id}
    settings["training"] = {**common.get("training", {}), **job.get("training", {})}
    seed = settings.pop("seed", 11)
    file = make_spec(folder, model=model, **settings)
    spec = json.loads(file.read_bytes())
    spec["job"]["seed"] = seed
    file.write_text(json.dumps(spec))
    return file


def write_cotraining(folder: Path, trainees: dict[str, Path], **limits: Any) -> Path:
    specs = [AttemptSpec.model_validate_json(file.read_bytes()) for file in trainees.values()]
    file = folder / "cotraining.json"
    file.write_text(CotrainingSpec(trainees=specs, **limits).model_dump_json())
    return file


def end_of(out: Path) -> int:
    return TraineeEnd.model_validate_json((out / "end.json").read_bytes()).code


def result(out: Path) -> dict[str, Any]:
    """What a run has left, without the moments and durations in it."""
    fleeting = {"time", "seconds_per_step", "train_seconds", "save_seconds", "memory_bytes"}
    fleeting |= {"peak_memory_bytes", "peak_allocated", "peak_reserved"}
    events = [
        event.model_dump(exclude=fleeting) for event in read_events(out) if event.type not in ("alive", "message")
    ]
    files = {
        str(file.relative_to(out)): file.read_bytes()
        for place in ("adapter", "checkpoints")
        for file in sorted((out / place).rglob("*"))
        if file.is_file() and file.name not in ("state.json", "manifest.json")
    }
    states = {str(file.relative_to(out)): _timeless(file) for file in sorted(out.glob("checkpoints/*/state.json"))}
    return {"events": events, "files": files, "states": states}


def _timeless(file: Path) -> Any:
    state = json.loads(file.read_bytes())
    del state["progress"]["train_seconds"]
    return state


def alone(trainees: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each leaves when it has the process for itself."""
    results = {}
    for job_id, spec in trainees.items():
        assert run(spec, spec.parent / "alone")[0] == EXIT_DONE
        results[job_id] = result(spec.parent / "alone")
    return results


def product(one: dict[str, Any]) -> bytes:
    return one["files"]["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("method", "common"),
    [
        ("lora", {}),
        ("qlora", {}),
        ("qlora", {"training": {"dtype": "bfloat16"}, "quantization": {"bnb_4bit_compute_dtype": "bfloat16"}}),
        (
            "qlora",
            {
                "training": {"dtype": "bfloat16"},
                "quantization": {"bnb_4bit_compute_dtype": "bfloat16"},
                "keep_dequantized": True,
            },
        ),
        ("dora", {}),
    ],
    ids=["lora", "qlora", "qlora in bfloat16", "qlora with kept weights", "dora"],
)
def test_each_trainee_gets_bit_for_bit_what_it_gets_alone(
    model: Path, tmp_path: Path, method: str, common: dict[str, Any]
) -> None:
    trainees = write_trainees(tmp_path, UNLIKE, model=model, method=method, **common)

    code = together.main(write_cotraining(tmp_path, trainees), tmp_path / "out")

    expected = alone(trainees)
    assert (code, {end_of(tmp_path / "out" / job_id) for job_id in trainees}) == (EXIT_DONE, {EXIT_DONE})
    assert {job_id: result(tmp_path / "out" / job_id) for job_id in trainees} == expected
    assert len({product(one) for one in expected.values()}) == 3


def test_jobs_of_unlike_objectives_share_a_base_too(model: Path, tmp_path: Path) -> None:
    pairs = {"rows": preference_rows(6), "data_format": "preference", "adapter": {"lora_dropout": 0.1}}
    jobs = {
        "ftjob-a": {"rows": chat_rows(8), "adapter": {"lora_dropout": 0.1}},
        "ftjob-b": {**pairs, "validation": preference_rows(2), "objective": {"type": "dpo"}},
        "ftjob-c": {**pairs, "objective": {"type": "orpo"}},
    }
    trainees = write_trainees(tmp_path, jobs, model=model)

    assert together.main(write_cotraining(tmp_path, trainees), tmp_path / "out") == EXIT_DONE

    assert {job_id: result(tmp_path / "out" / job_id) for job_id in trainees} == alone(trainees)


def test_adapters_that_begin_with_a_look_at_the_base_leave_it_as_it_is(model: Path, tmp_path: Path) -> None:
    jobs: Jobs = {
        "ftjob-eva": {"adapter": {"init_lora_weights": "eva"}},
        "ftjob-loftq": {"adapter": {"init_lora_weights": "loftq"}, "validation": chat_rows(3)},
        "ftjob-plain": {},
    }
    trainees = write_trainees(tmp_path, jobs, model=model, method="qlora")

    assert together.main(write_cotraining(tmp_path, trainees), tmp_path / "out") == EXIT_DONE

    assert {job_id: result(tmp_path / "out" / job_id) for job_id in trainees} == alone(trainees)


def test_trainees_take_turns_of_one_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole_turn = together.Trainee.take_turn

    def noted(trainee: together.Trainee) -> bool:
        order.append(trainee.spec.job_id)
        return whole_turn(trainee)

    monkeypatch.setattr(together.Trainee, "take_turn", noted)
    jobs = {"ftjob-a": {"training": {"num_train_epochs": 1}}, "ftjob-b": {}}  # 3 and 6 steps
    trainees = write_trainees(tmp_path, jobs, model=model)

    together.main(write_cotraining(tmp_path, trainees), tmp_path / "out")

    preparation_steps_and_product = 1 + 3 + 1
    assert order[: 2 * preparation_steps_and_product] == ["ftjob-a", "ftjob-b"] * preparation_steps_and_product
    assert set(order[2 * preparation_steps_and_product :]) == {"ftjob-b"}


class StopsAfter:
    """Asks for a stop through a file when one trainee has made so many steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, job_id: str, step: int, file: Path) -> None:
        whole_write = Reporter.write

        def write(reporter: Reporter, event: Callable[..., Any], **fields: Any) -> None:
            whole_write(reporter, event, **fields)
            if event is Metrics and fields["step"] == step and reporter in self.watched:
                file.touch()

        self.watched: list[Reporter] = []
        whole_admit = together.Together.admit

        def admit(them: together.Together, spec: AttemptSpec, *, out: Path) -> None:
            whole_admit(them, spec, out=out)
            if spec.job_id == job_id:
                self.watched.append(them.trainees[-1].reporter)

        monkeypatch.setattr(Reporter, "write", write)
        monkeypatch.setattr(together.Together, "admit", admit)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_co_training_that_was_stopped_goes_on_and_so_does_a_trainee_alone(
    model: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainees = write_trainees(tmp_path, UNLIKE, model=model, method=method)
    file, out = write_cotraining(tmp_path, trainees), tmp_path / "out"
    with monkeypatch.context() as patched:
        (out).mkdir()
        StopsAfter(patched, job_id="ftjob-dropout", step=2, file=out / "stop")
        assert together.main(file, out) == EXIT_STOPPED
    (out / "stop").unlink()
    assert {end_of(out / job_id) for job_id in trainees} == {EXIT_STOPPED}

    assert run(trainees["ftjob-noisy"], out / "ftjob-noisy")[0] == EXIT_DONE
    assert together.main(file, out) == EXIT_DONE

    expected = alone(trainees)
    for job_id in trainees:
        assert result(out / job_id)["files"] == expected[job_id]["files"]
    firsts = [event.first_step for event in read_events(out / "ftjob-dropout") if event.type == "started"]
    assert firsts == [0, 2]


def test_a_trainee_that_is_stopped_holds_up_nobody(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainees = write_trainees(tmp_path, UNLIKE, model=model)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        StopsAfter(patched, job_id="ftjob-plain", step=3, file=out / "ftjob-plain" / "stop")
        assert together.main(write_cotraining(tmp_path, trainees), out) == EXIT_DONE

    ends = {job_id: end_of(out / job_id) for job_id in trainees}
    assert ends == {"ftjob-plain": EXIT_STOPPED, "ftjob-dropout": EXIT_DONE, "ftjob-noisy": EXIT_DONE}
    assert (read_events(out / "ftjob-plain")[-1].type, read_events(out / "ftjob-plain")[-1].step) == ("checkpoint", 3)
    expected = alone(trainees)
    for job_id in ("ftjob-dropout", "ftjob-noisy"):
        assert result(out / job_id) == expected[job_id]


def test_a_row_that_is_refused_a_loss_that_is_none_and_a_crash_end_their_own_trainee_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: Jobs = {
        "ftjob-bad-row": {"rows": [chat("u" * 300, "a")]},  # cut before its answer: nothing to learn
        "ftjob-nan": {"rows": chat_rows(5)},
        "ftjob-crash": {"rows": chat_rows(7)},
    }
    trainees = write_trainees(tmp_path, {**broken, **UNLIKE}, model=model)
    whole_loss = SupervisedObjective.loss
    steps: dict[str, int] = {}

    def spoilt(objective: SupervisedObjective, network: torch.nn.Module, batch: MicroBatch) -> Loss:
        loss = whole_loss(objective, network, batch)
        job_id = objective._spec.job_id
        steps[job_id] = steps.get(job_id, 0) + 1
        if steps[job_id] < 3 or job_id not in broken:
            return loss
        if job_id == "ftjob-crash":
            raise KeyError("the crash")
        return Loss(loss.total * torch.nan, loss.correct)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(SupervisedObjective, "loss", spoilt)
        assert together.main(write_cotraining(tmp_path, trainees), out) == EXIT_DONE

    ends = {job_id: end_of(out / job_id) for job_id in broken}
    assert ends == {"ftjob-bad-row": EXIT_USER_FAULT, "ftjob-nan": EXIT_USER_FAULT, "ftjob-crash": 1}
    assert read_events(out / "ftjob-bad-row")[-1].code == "no_trainable_tokens"
    assert read_events(out / "ftjob-nan")[-1].code == "nan_loss"
    assert "the crash" in capsys.readouterr().err
    assert not any((out / job_id / "adapter").exists() for job_id in broken)
    expected = alone({job_id: trainees[job_id] for job_id in UNLIKE})
    assert {job_id: result(out / job_id) for job_id in UNLIKE} == expected


def test_out_of_memory_ends_all_and_each_goes_on_alone_from_what_it_had(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainees = write_trainees(tmp_path, UNLIKE, model=model)
    whole_update = together.turns

    def short_of_memory(training: TrainingRun) -> Any:
        for _ in whole_update(training):
            if training.spec.job_id == "ftjob-dropout" and training.progress.step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(together, "turns", short_of_memory)
        assert together.main(write_cotraining(tmp_path, trainees), out) == EXIT_OUT_OF_MEMORY

    ends = {job_id: end_of(out / job_id) for job_id in trainees}
    assert ends == {"ftjob-plain": EXIT_STOPPED, "ftjob-dropout": EXIT_OUT_OF_MEMORY, "ftjob-noisy": EXIT_STOPPED}
    assert read_events(out / "ftjob-dropout")[-1].code == "gpu_oom"
    assert [read_events(out / job_id)[-1].type for job_id in ("ftjob-plain", "ftjob-noisy")] == ["checkpoint"] * 2

    expected = alone(trainees)
    for job_id, spec in trainees.items():
        assert run(spec, out / job_id)[0] == EXIT_DONE
        assert product(result(out / job_id)) == product(expected[job_id])


def test_a_base_that_memory_does_not_hold_ends_every_trainee_as_out_of_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_: AttemptSpec) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(together, "load_base", too_large)
    trainees = write_trainees(tmp_path, UNLIKE, model=model)

    assert together.main(write_cotraining(tmp_path, trainees), tmp_path / "out") == EXIT_OUT_OF_MEMORY

    for job_id in trainees:
        assert end_of(tmp_path / "out" / job_id) == EXIT_OUT_OF_MEMORY
        assert read_events(tmp_path / "out" / job_id)[-1].code == "gpu_oom"


def test_a_co_training_that_is_killed_goes_on_bit_for_bit(model: Path, tmp_path: Path) -> None:
    training = {"num_train_epochs": 30, "save_steps": 3}
    jobs = {
        "ftjob-a": {"training": training, "adapter": {"lora_dropout": 0.1}},
        "ftjob-b": {"training": training, "rows": chat_rows(8), "validation": chat_rows(3)},
    }
    trainees = write_trainees(tmp_path, jobs, model=model, method="qlora")
    file, out = write_cotraining(tmp_path, trainees), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.train.together", str(file), str(out)],
        cwd=Path(__file__).parents[2],
        env=trainer_environment(),
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + patience(120)
    while any(steps_told(out / job_id) < 5 for job_id in trainees):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=patience(30))
    assert not any((out / job_id / "end.json").exists() for job_id in trainees)

    assert together.main(file, out) == EXIT_DONE

    expected = alone(trainees)
    for job_id in trainees:
        starts = [event.first_step for event in read_events(out / job_id) if event.type == "started"]
        assert starts[0] == 0 < starts[1]
        assert result(out / job_id)["files"] == expected[job_id]["files"]


def test_the_device_seconds_of_trainees_are_those_of_their_own_turns(model: Path, tmp_path: Path) -> None:
    jobs: Jobs = {"ftjob-a": {"training": {"num_train_epochs": 1}}, "ftjob-b": {}}  # 3 and 6 steps
    trainees = write_trainees(tmp_path, jobs, model=model)
    clock = iter(range(1000))  # a second passes with each look at it: at the beginning and at the end of a turn
    stop = StopRequest(tmp_path, ranks=Ranks())
    jobs_together = together.Together(
        stop=stop, before=None, peaks=lambda: Peaks(0, 0, 0), clock=lambda: float(next(clock))
    )
    for job_id, spec in trainees.items():
        jobs_together.admit(AttemptSpec.model_validate_json(spec.read_bytes()), out=tmp_path / "out" / job_id)

    assert jobs_together.train() == EXIT_DONE

    ends = [
        TraineeEnd.model_validate_json((tmp_path / "out" / job_id / "end.json").read_bytes()) for job_id in trainees
    ]
    preparation, product = 1, 1
    assert [end.device_seconds for end in ends] == [preparation + 3 + product, preparation + 6 + product]


@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "16 bits"])
def test_trees_share_every_frozen_weight_and_nothing_that_trains(model: Path, quantized: bool) -> None:
    quantization = four_bit(Quantization()) if quantized else None
    base = load_frozen(model, dtype=torch.float32, quantization=quantization, device="cpu", place="cpu")
    first, second = tree_over(base), tree_over(base)

    kept = dict(base.named_parameters())
    for tree in (first, second):
        assert {name: id(weight) for name, weight in tree.named_parameters()} == {
            name: id(weight) for name, weight in kept.items()
        }
        assert {id(module) for module in tree.modules()}.isdisjoint(id(module) for module in base.modules())
    if quantized:
        layers = [tree.model.layers[0].mlp.up_proj for tree in (base, first, second)]
        assert len({id(layer.weight.quant_state) for layer in layers}) == 1
        assert len({layer.quant_state.absmax.data_ptr() for layer in layers}) == 1
    assert first.config is not second.config


def test_jobs_that_cannot_share_a_base_are_refused_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    trainees = write_trainees(tmp_path, {"ftjob-a": {}, "ftjob-b": {"adapter": {"method": "full"}}}, model=model)

    code = together.main(write_cotraining(tmp_path, trainees), tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert read_events(tmp_path / "out")[-1].code == "cannot_train_together"
    assert read_events(tmp_path / "out")[-1].message == (
        "These jobs cannot train together: ftjob-b: every weight of its base trains."
    )


def test_no_start_that_moves_the_base_is_admitted() -> None:
    assert set(cotraining._INITS_THAT_MOVE_THE_BASE) == MUTATING_INITS


def test_while_one_works_those_that_wait_give_signs_of_life(tmp_path: Path) -> None:
    ticks = [0.0]
    everybody: list[Reporter] = []
    for name in ("a", "b"):
        reporter = TraineeReporter(tmp_path / f"{name}.jsonl", waiting=lambda: everybody, clock=lambda: 1.0)
        reporter._ticks, reporter._told_at = (lambda: ticks[0]), 0.0
        everybody.append(reporter)

    everybody[0].alive("validation")
    ticks[0] = SIGN_SECONDS
    everybody[0].alive("validation")
    everybody[0].alive("validation")

    signs = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("a", "b")}
    assert [json.loads(line)["doing"] for line in signs["a"]] == ["validation"]
    assert [json.loads(line)["doing"] for line in signs["b"]] == ["step"]


def test_the_base_is_as_it_was_after_a_co_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = []

    def kept(spec: AttemptSpec) -> Any:
        bases.append(whole_load(spec))
        return bases[0]

    whole_load = together.load_base
    monkeypatch.setattr(together, "load_base", kept)
    trainees = write_trainees(tmp_path, UNLIKE, model=model)

    together.main(write_cotraining(tmp_path, trainees), tmp_path / "out")

    (base,) = bases
    fresh = AutoModelForCausalLM.from_pretrained(model)
    for name, weight in fresh.named_parameters():
        assert torch.equal(weight, base.get_parameter(name))
    assert not any(weight.requires_grad and weight.grad is not None for weight in base.parameters())
