from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.families import FAMILIES
from shared.contract.spec import Adapter
from tests.train.tiny import chat, chat_rows, kto_rows, losses, make_model_directory, make_spec, preference_rows, run
from worker.train import initialisation
from worker.train.initialisation import main_directions, pissa_by_upstreams_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]

LEARNING = {"num_train_epochs": 6, "lr_scheduler_type": "constant"}


def train(folder: Path, model: Path, **settings: Any) -> tuple[int, list[Any]]:
    settings = {"rows": [chat("who?", "me")] * 8, "training": LEARNING, **settings}
    return run(make_spec(folder, model=model, **settings), folder / "out")


def assert_learns(events: list[Any]) -> None:
    assert events[-1].type == "finished", events[-1]
    curve = list(losses(events).values())
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora", "full"])
def test_every_method_learns_and_its_product_loads(model: Path, tmp_path: Path, method: str) -> None:
    code, events = train(tmp_path, model, adapter={"method": method})

    assert code == EXIT_DONE
    assert_learns(events)
    product = tmp_path / "out" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(product if method == "full" else model)
    loaded = base if method == "full" else PeftModel.from_pretrained(base, product)
    assert sum(parameter.numel() for parameter in loaded.parameters()) >= events[0].trainable_parameters


@pytest.mark.parametrize(
    ("method", "init"),
    [("lora", "gaussian"), ("lora", "pissa"), ("lora", "olora"), ("lora", "eva"), ("qlora", "loftq"), ("qlora", "eva")],
)
def test_every_initialisation_learns(model: Path, tmp_path: Path, method: str, init: str) -> None:
    code, events = train(tmp_path, model, adapter={"method": method, "init_lora_weights": init})

    assert code == EXIT_DONE, events[-1]
    assert_learns(events)


@pytest.mark.parametrize(("init", "whole_side"), [("pissa", 1024), ("pissa", 8), ("olora", 1024)])
def test_a_product_whose_start_moved_the_base_fits_the_untouched_base(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, whole_side: int
) -> None:
    """The loss of the product on the original base is the loss that training ended with."""
    monkeypatch.setattr(initialisation, "WHOLE_SIDE", whole_side)
    monkeypatch.setattr(initialisation, "RANKS_PER_SIDE", 2)
    rows = [chat("who?", "me")] * 4
    training = {"num_train_epochs": 5, "lr_scheduler_type": "constant"}
    settings = {"rows": rows, "validation": rows[:1], "training": training}
    _, events = train(tmp_path, model, adapter={"init_lora_weights": init}, **settings)
    seen = [event.valid_loss for event in events if event.type == "validation"][-1]

    product = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out" / "adapter")
    merged = product.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "merged" / file).write_bytes((model / file).read_bytes())
    still = {**settings, "training": {"learning_rate": 1e-12, "num_train_epochs": 1, "max_steps": 1}}
    _, again = train(tmp_path / "again", tmp_path / "merged", **still)

    assert losses(again)[1] == pytest.approx(seen, rel=1e-3)


@pytest.mark.parametrize(("side", "name"), [(1024, "pissa"), (4096, "pissa_niter_16")])
def test_the_layers_of_a_wide_base_are_not_decomposed_whole(side: int, name: str) -> None:
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(side, 4 * side))

    assert pissa_by_upstreams_name(base, Adapter(method="lora", init_lora_weights="pissa")) == name


def test_a_rank_that_takes_most_of_a_wide_layer_has_it_decomposed_whole() -> None:
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(4096, 4096))

    patterned = Adapter(method="lora", r=16, init_lora_weights="pissa", rank_pattern={"0": 1024})
    assert pissa_by_upstreams_name(base, patterned) == "pissa"


@pytest.mark.parametrize("shape", [(1200, 1100), (1100, 1200), (40, 60)])
def test_the_main_directions_of_a_matrix_are_those_it_was_made_of(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    left, right = (torch.linalg.qr(torch.randn(size, 12)).Q for size in (rows, columns))
    values = torch.linspace(9.0, 2.0, 12)
    matrix = (left * values) @ right.T + 1e-4 * torch.randn(rows, columns)

    first, sizes, last = main_directions(matrix, rank=4)

    assert (first.shape, last.shape) == ((rows, 4), (4, columns))
    torch.testing.assert_close(sizes, values[:4], atol=0.01, rtol=0)
    torch.testing.assert_close((first * sizes) @ last, (left[:, :4] * values[:4]) @ right[:, :4].T, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("adapter", "objective"),
    [
        ({"method": "qlora", "init_lora_weights": "pissa"}, {"type": "supervised"}),
        ({"method": "full"}, {"type": "dpo"}),
        ({"method": "full"}, {"type": "kto"}),
    ],
)
def test_a_combination_that_is_refused_at_submit_never_trains(
    model: Path, tmp_path: Path, adapter: dict[str, Any], objective: dict[str, Any]
) -> None:
    rows = {"dpo": preference_rows, "kto": kto_rows}.get(objective["type"], chat_rows)(4)
    data_format = {"dpo": "preference", "kto": "kto"}.get(objective["type"], "chat")
    with pytest.raises(AssertionError, match="refused at submit"):
        train(tmp_path, model, adapter=adapter, objective=objective, rows=rows, data_format=data_format)


@pytest.mark.parametrize(
    ("adapter", "code", "param"),
    [
        ({"target_modules": ["c_attn"]}, "target_modules_not_found", "adapter.target_modules"),
        ({"target_modules": ["lm_head"]}, "unsupported_combination", "adapter.target_modules"),
        ({"modules_to_save": ["nothing"]}, "modules_not_found", "adapter.modules_to_save"),
        ({"rank_pattern": {"nothing": 4}}, "modules_not_found", "adapter.rank_pattern"),
        ({"layers_to_transform": [2]}, "layers_not_found", "adapter.layers_to_transform"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(
    model: Path, tmp_path: Path, adapter: dict[str, Any], code: str, param: str
) -> None:
    exit_code, events = train(tmp_path, model, adapter=adapter)

    assert exit_code == EXIT_USER_FAULT
    assert (events[-1].code, events[-1].param) == (code, param)


def test_the_refusal_of_target_modules_names_those_that_exist(model: Path, tmp_path: Path) -> None:
    _, events = train(tmp_path, model, adapter={"target_modules": ["q_proj", "c_attn"]})

    assert "c_attn" in events[-1].message
    assert "down_proj, gate_proj, k_proj" in events[-1].message


def test_options_of_the_adapter_reach_the_weights(model: Path, tmp_path: Path) -> None:
    adapter = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "layers_to_transform": [1],
        "use_rslora": True,
        "modules_to_save": ["norm"],
    }
    code, events = train(tmp_path, model, adapter=adapter)

    assert code == EXIT_DONE, events[-1]
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {"q_proj": 4, "v_proj": 2}
    assert all(".layers.1." in name for name in tensors if "lora" in name)
    assert any(name.endswith("model.norm.weight") for name in tensors)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True


def test_with_lora_plus_the_b_matrices_learn_faster(model: Path, tmp_path: Path) -> None:
    moved = {}
    for ratio in (None, 16.0):
        folder = tmp_path / str(ratio)
        adapter = {"loraplus_lr_ratio": ratio}
        training = {"max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-4}
        code, events = train(folder, model, adapter=adapter, training=training)
        assert code == EXIT_DONE, events[-1]
        tensors = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
        moved[ratio] = max(tensor.abs().max().item() for name, tensor in tensors.items() if "lora_B" in name)

    assert moved[16.0] == pytest.approx(16 * moved[None], rel=0.01)


def test_gradient_checkpointing_changes_memory_and_not_the_curve(model: Path, tmp_path: Path) -> None:
    curves = [losses(train(tmp_path / str(on), model, gradient_checkpointing=on)[1]) for on in (True, False)]

    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_recomputed_in_bfloat16_as_they_were(
    model: Path, tmp_path: Path, method: str, dropout: float
) -> None:
    settings: dict[str, Any] = {
        "adapter": {"method": method, "lora_dropout": dropout},
        "training": {"dtype": "bfloat16"},
        "quantization": {"bnb_4bit_compute_dtype": "bfloat16"},
    }

    runs = [train(tmp_path / str(on), model, gradient_checkpointing=on, **settings) for on in (True, False)]

    assert [code for code, _ in runs] == [EXIT_DONE, EXIT_DONE]
    assert losses(runs[0][1]) == pytest.approx(losses(runs[1][1]), rel=1e-4)


def families() -> dict[str, Any]:
    """Small configs of the architectures that users bring."""
    from transformers import (
        FalconConfig,
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        PhiConfig,
        Qwen2Config,
        Qwen3Config,
    )

    common = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    grouped = {**common, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**grouped),
        "mistral": MistralConfig(**grouped),
        "qwen2": Qwen2Config(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=16),
        "gemma": GemmaConfig(**grouped, head_dim=16),
        "phi": PhiConfig(**common),
        "phi3": Phi3Config(**grouped),
        "gpt_neox": GPTNeoXConfig(**common),
        "falcon": FalconConfig(**{key: value for key, value in common.items() if key != "intermediate_size"}),
        "gpt2": GPT2Config(
            vocab_size=260, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1, pad_token_id=2
        ),
    }


@pytest.mark.parametrize("family", sorted(families()))
def test_the_table_of_a_family_names_the_linear_modules_it_has(family: str) -> None:
    """What is refused at submit by the table is what the trainer would not find, and the reverse."""
    network = AutoModelForCausalLM.from_config(families()[family])
    table = FAMILIES[type(network).__name__]

    kinds = (torch.nn.Linear, Conv1D)
    found = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, kinds)}
    named = {name.rsplit(".", 1)[-1] for name, _ in network.named_modules()}

    assert found - {table.head} == set(table.linear)
    assert {table.embedding, table.head} <= named
    # Some versions of a family lack a norm (Falcon's two layouts, Gemma 1 and 2), none has one that is not listed.
    norms = {name for name in named if "norm" in name or name.startswith("ln_")}
    assert norms <= set(table.norms) | {"q_norm", "k_norm"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mistral", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen2", ["q_proj", "v_proj"]),
        ("phi", ["q_proj", "k_proj", "v_proj", "dense"]),
        ("phi3", ["qkv_proj", "o_proj"]),
        ("gpt_neox", ["query_key_value", "dense"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("falcon", ["query_key_value"]),
    ],
)
def test_modules_given_by_the_names_users_know_are_the_ones_adapted(
    family: str, names: list[str], tmp_path: Path
) -> None:
    folder = make_model_directory(tmp_path / "model", families()[family])

    code, events = train(tmp_path, folder, adapter={"target_modules": names}, training={"max_steps": 1})

    assert code == EXIT_DONE, events[-1]
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == set(names)


@pytest.mark.parametrize("family", sorted(families()))
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_all_linear_layers_of_a_family_learn_packed(family: str, method: str, tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path / "model", families()[family])

    code, events = train(tmp_path, folder, adapter={"method": method})

    assert code == EXIT_DONE, events[-1]
    assert_learns(events)
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert not any("lm_head" in name or "embed_out" in name for name in tensors)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
