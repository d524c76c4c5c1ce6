"""Every option of a job reaches the library that does it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec
from tests.train.tiny import losses, make_model_directory, make_spec, read_events, run
from worker.train import methods
from worker.train.base_model import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]


def product(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return config, load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("quantization", "kind", "nested"),
    [
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4", True),
        ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "fp4", False),
    ],
)
def test_four_bit_options_reach_the_stored_weights(
    model: Path, tmp_path: Path, quantization: dict[str, Any], kind: str, nested: bool
) -> None:
    file = make_spec(tmp_path, model=model, quantization=quantization)
    spec = AttemptSpec.model_validate_json(file.read_bytes())

    network = load_model(spec, weights=model, quantized=True, trains_in_full=False)

    layers = [module for module in network.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert {layer.weight.quant_state.quant_type for layer in layers} == {kind}
    assert {layer.weight.quant_state.nested for layer in layers} == {nested}
    assert {layer.compute_dtype for layer in layers} == {torch.float32}


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_a_four_bit_base_learns_in_every_arithmetic(model: Path, tmp_path: Path, compute: str) -> None:
    quantization = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": compute}
    code, events = run(
        make_spec(tmp_path, model=model, adapter={"method": "qlora"}, quantization=quantization), tmp_path / "out"
    )

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[6] < losses(events)[1]


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "sgd"])
def test_every_optimizer_learns(model: Path, tmp_path: Path, optim: str, method: str) -> None:
    training = {"optim": optim, "lr_scheduler_type": "constant", **({"learning_rate": 0.3} if optim == "sgd" else {})}
    code, events = run(
        make_spec(tmp_path, model=model, adapter={"method": method}, training=training), tmp_path / "out"
    )

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[6] < losses(events)[1]


@pytest.mark.parametrize(("bias", "names"), [("none", 0), ("lora_only", 2), ("all", 4)])
def test_biases_train_as_asked(tmp_path: Path, bias: str, names: int) -> None:
    """GPT-2's block has a bias in each of its four linear layers; two of them are adapted here."""
    config = GPT2Config(vocab_size=260, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    folder = make_model_directory(tmp_path / "model", config)
    adapter = {"bias": bias, "target_modules": ["c_attn", "c_fc"]}

    code, events = run(make_spec(tmp_path, model=folder, adapter=adapter), tmp_path / "out")

    assert code == EXIT_DONE, events[-1]
    _, tensors = product(tmp_path / "out")
    assert len([name for name in tensors if name.endswith("bias") and "ln_" not in name]) == names


def test_patterns_set_rank_and_scale_per_module(model: Path, tmp_path: Path) -> None:
    adapter = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 32},
    }
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model, adapter=adapter).read_bytes())
    network = load_model(spec, weights=model, quantized=False, trains_in_full=False)

    adapted = methods.adapt(network, spec=spec, initial=tmp_path, rows=[])

    scales = {
        name.rsplit(".", 1)[-1]: m.scaling["default"] for name, m in adapted.named_modules() if hasattr(m, "lora_A")
    }
    assert scales == {"q_proj": 1.0, "v_proj": 16.0}


def test_a_gaussian_start_draws_a_with_a_deviation_of_one_over_the_rank(model: Path, tmp_path: Path) -> None:
    file = make_spec(tmp_path, model=model, adapter={"r": 8, "init_lora_weights": "gaussian"})
    spec = AttemptSpec.model_validate_json(file.read_bytes())
    network = load_model(spec, weights=model, quantized=False, trains_in_full=False)

    adapted = methods.adapt(network, spec=spec, initial=tmp_path, rows=[])

    drawn = torch.cat([weight.flatten() for name, weight in adapted.named_parameters() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0] * 6),
        ("constant_with_warmup", [0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]),
        ("cosine", [0.0, 1 / 3, 2 / 3, 1.0, 0.75, 0.25]),
    ],
)
def test_learning_rates_follow_the_schedule_and_its_warm_up(
    model: Path, tmp_path: Path, schedule: str, rates: list[float]
) -> None:
    training = {"lr_scheduler_type": schedule, "warmup_ratio": 0.5, "learning_rate": 0.01}
    _, events = run(make_spec(tmp_path, model=model, training=training), tmp_path / "out")

    seen = [event.learning_rate / 0.01 for event in events if event.type == "metrics"]
    assert seen == pytest.approx(rates)


def test_gradients_are_clipped_to_their_norm(model: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent moves the weights by learning rate times the clipped norm."""
    training = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    moved = {}
    for norm in (0.01, 1000.0):
        spec = make_spec(tmp_path / str(norm), model=model, training={**training, "max_grad_norm": norm})
        run(spec, tmp_path / str(norm) / "out")
        _, tensors = product(tmp_path / str(norm) / "out")
        steps = [tensor.square().sum().item() for name, tensor in tensors.items() if "lora_B" in name]
        moved[norm] = math.sqrt(sum(steps))

    (first,) = [event for event in read_events(tmp_path / "1000.0" / "out") if event.type == "metrics"]
    assert moved[0.01] == pytest.approx(0.01, rel=0.01)
    assert moved[1000.0] == pytest.approx(first.grad_norm, rel=0.01)


def test_neftune_noise_reaches_the_embeddings_in_training_only(model: Path, tmp_path: Path) -> None:
    curves, looks = [], []
    for alpha in (None, 50.0):
        folder = tmp_path / str(alpha)
        training = {"neftune_noise_alpha": alpha, "packing": False, "max_steps": 1, "learning_rate": 1e-12}
        spec = make_spec(folder, model=model, training=training, validation=[{"messages": HELLO}])
        _, events = run(spec, folder / "out")
        curves.append(losses(events)[1])
        looks.append(next(event.valid_loss for event in events if event.type == "validation"))

    assert curves[0] != pytest.approx(curves[1], rel=1e-3)
    assert looks[0] == pytest.approx(looks[1], rel=1e-6)


HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("data_format", "row"),
    [("text", {"text": "the quick brown fox"}), ("prompt_completion", {"prompt": "2+2=", "completion": "4"})],
)
def test_plain_rows_are_learned(model: Path, tmp_path: Path, data_format: str, row: dict[str, str]) -> None:
    spec = make_spec(tmp_path, model=model, rows=[row] * 12, data_format=data_format)
    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[6] < losses(events)[1]
