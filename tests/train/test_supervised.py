from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.contract.spec import AttemptSpec
from tests.patience import patience
from tests.train.tiny import CHATML, chat, chat_rows, losses, make_spec, make_tokenizer, run
from worker.train.data import RowReader
from worker.train.objectives import supervised
from worker.train.objectives.supervised import fused_loss, labelled_nll, packed

LOAD_WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0, ids.shape[1]:]
assert not any(name.split(".")[0] in ("worker", "shared") for name in sys.modules)
print(tokenizer.decode(written))
"""


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run that learned one answer by heart."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [chat("who?", "me")] * 8
    training = {"num_train_epochs": 30, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    code, _ = run(make_spec(folder, model=model, rows=rows, training=training), folder / "out")
    assert code == 0
    return folder / "out"


def test_the_adapter_loads_with_plain_peft_and_the_model_answers_and_stops(model: Path, taught: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, str(model), str(taught / "adapter"), "who?"],
        capture_output=True,
        text=True,
        cwd=taught,
        check=False,
        timeout=patience(120),
    )

    assert done.stdout == "me<|im_end|>\n", done.stderr


def test_the_adapter_names_its_base_its_data_and_its_versions_and_no_path(taught: Path, model: Path) -> None:
    adapter = taught / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    manifest = json.loads((adapter / "run_manifest.json").read_text())

    assert {file.name for file in adapter.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "run_manifest.json",
    }
    assert (config["base_model_name_or_path"], config["revision"]) == ("example/tiny", "0" * 40)
    assert len(manifest["data"]["train"]["sha256"]) == 64
    assert manifest["libraries"]["peft"]
    for file in adapter.glob("*.[jm]*"):
        assert str(model) not in file.read_text()


def test_events_tell_the_whole_run_in_order(model: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, model=model, validation=chat_rows(3), training={"num_train_epochs": 1})

    _, events = run(spec, tmp_path / "out")

    kinds = [event.type for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert [event.step for event in events if event.type == "metrics"] == [1, 2, 3]
    looks = {event.step: event for event in events if event.type == "validation"}
    assert [look.full for look in looks.values()] == [True, True, True]
    saved = [event for event in events if event.type == "checkpoint"]
    assert [event.full_valid_loss for event in saved] == [looks[event.step].valid_loss for event in saved]
    assert all(event.full_valid_mean_token_accuracy is not None for event in saved)
    assert events[0].total_steps == 3
    assert events[0].labelled_tokens_per_epoch < events[0].train_tokens_per_epoch
    assert events[-1].trained_tokens == events[0].train_tokens_per_epoch
    assert events[-1].peak_memory_bytes > 0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_validation_pass_amid_training_leaves_the_curve_as_it_was(model: Path, tmp_path: Path, method: str) -> None:
    curves = []
    for validation in (None, chat_rows(5)):
        folder = tmp_path / f"{validation is None}"
        spec = make_spec(
            folder,
            model=model,
            validation=validation,
            adapter={"method": method, "lora_dropout": 0.1},
            training={"eval": {"steps": 1}, "optim": "paged_adamw_8bit"},
        )
        code, events = run(spec, folder / "out")
        assert code == 0
        curves.append(losses(events))

    assert curves[0] == curves[1]
    assert curves[0][6] < curves[0][1]


def test_the_best_checkpoint_is_published_and_the_reason_told(model: Path, tmp_path: Path) -> None:
    # Validation on what training unlearns: the first look is the best one.
    spec = make_spec(
        tmp_path,
        model=model,
        rows=[chat("who?", "me")] * 4,
        validation=[chat("who?", "zzzz")],
        training={"num_train_epochs": 12, "learning_rate": 0.02, "early_stopping": {"patience": 3}},
    )

    code, events = run(spec, tmp_path / "out")

    looks = {event.step: event.valid_loss for event in events if event.type == "validation"}
    best = min(looks, key=looks.__getitem__)
    assert code == 0
    assert events[-1].published_step == best
    assert events[-1].steps == best + 3 < 12
    assert "stopped early" in events[-1].published_reason
    published = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    kept = tmp_path / "out" / "checkpoints" / f"step-{best:08d}" / "adapter" / "adapter_model.safetensors"
    assert published == kept.read_bytes()


def test_the_last_checkpoint_is_published_when_asked_for(model: Path, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        model=model,
        rows=[chat("who?", "me")] * 4,
        validation=[chat("who?", "zzzz")],
        training={"num_train_epochs": 4, "learning_rate": 0.02, "publish": "last"},
    )

    _, events = run(spec, tmp_path / "out")

    assert events[-1].published_step == 4


def test_two_runs_of_one_spec_are_the_same_run(model: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("first", "second"):
        spec = make_spec(
            tmp_path / name, model=model, adapter={"lora_dropout": 0.2}, training={"neftune_noise_alpha": 5.0}
        )
        run(spec, tmp_path / name / "out")
        weights.append((tmp_path / name / "out" / "adapter" / "adapter_model.safetensors").read_bytes())

    assert weights[0] == weights[1]


def test_projecting_labelled_positions_only_gives_the_loss_and_gradient_of_the_full_head(
    model: Path, tmp_path: Path
) -> None:
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model).read_bytes())
    tokenizer = make_tokenizer()
    rows = RowReader(tokenizer, facts=spec.job.data, training=spec.job.training).read(Path(spec.train_file)).rows
    inputs = packed(rows[:3]).inputs
    network = AutoModelForCausalLM.from_pretrained(model)
    trainer = supervised.build(network, tokenizer, spec=spec, out=tmp_path, total_steps=1).trainer

    ours = trainer.compute_loss(network, dict(inputs))
    (our_gradient,) = torch.autograd.grad(ours, network.model.layers[0].mlp.up_proj.weight)
    labels = inputs["labels"][:, 1:].flatten()
    logits = network(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (gradient,) = torch.autograd.grad(plain, network.model.layers[0].mlp.up_proj.weight)
    reads = {name: value for name, value in inputs.items() if name != "labels"}
    fused, right = fused_loss(network, reads, inputs["labels"])

    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(fused, plain)
    assert int(right) == int(trainer.correct_tokens)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_token_accuracy_counts_labelled_tokens_only() -> None:
    logits = torch.eye(4)[[1, 2, 3]] * 5
    _, correct = labelled_nll(logits, torch.tensor([1, 0, -100]))

    assert correct == 1


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_float32_adapters_on_a_four_bit_base_are_saved_exactly(model: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, model=model, adapter={"method": "qlora"}, training={"optim": "paged_adamw_8bit"})
    code, _ = run(spec, tmp_path / "out")

    assert code == 0
    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    weights = [parameter for name, parameter in adapter.named_parameters() if "lora_B" in name]
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def test_the_published_tokenizer_renders_the_template_that_was_trained(model: Path, tmp_path: Path) -> None:
    own = "{# the job's own #}" + CHATML
    spec = make_spec(tmp_path, model=model, training={"chat_template": own, "num_train_epochs": 1})
    run(spec, tmp_path / "out")

    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter").chat_template == own
