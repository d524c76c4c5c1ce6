"""Some layers recompute their activations and the others keep them: the same numbers, and memory between the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.contract.events import EXIT_DONE
from tests.train.families import make_family
from tests.train.tiny import losses, make_model_directory, make_spec, run
from worker.train.base_model import recompute_activations

LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=260, num_hidden_layers=LAYERS, initializer_range=0.1, **sizes)
    return make_model_directory(tmp_path_factory.mktemp("base"), config)


@contextmanager
def runs_of(layers: torch.nn.ModuleList) -> Iterator[list[int]]:
    """How often each layer's attention has computed."""
    counts = [0] * len(layers)

    def count(place: int) -> Any:
        def seen(*_: Any) -> None:
            counts[place] += 1

        return seen

    hooks = [layer.self_attn.register_forward_pre_hook(count(place)) for place, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def a_pass(model: Any) -> int:
    """Forward and backward; the bytes that autograd kept in between, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(24)[None] % 260
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize(("asked", "again"), [(1, [2, 1, 1, 1]), (3, [2, 2, 2, 1]), (None, [2] * 4), (9, [2] * 4)])
def test_the_first_layers_compute_twice_and_the_others_once(base: Path, asked: int | None, again: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).train()
    recompute_activations(model, layers=asked)

    with runs_of(model.model.layers) as counts:
        a_pass(model)

    assert counts == again


def test_each_layer_that_recomputes_saves_memory(base: Path) -> None:
    held = []
    for layers in range(1, LAYERS + 1):
        model = AutoModelForCausalLM.from_pretrained(base).train()
        recompute_activations(model, layers=layers)
        held.append(a_pass(model))

    assert held == sorted(held, reverse=True)
    assert len(set(held)) == LAYERS


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "gpt_oss"])
def test_layers_are_chosen_in_the_language_model_whatever_stands_beside_it(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_family(tmp_path, family)).train()
    recompute_activations(model, layers=1)

    with runs_of(model.get_decoder().layers) as counts:
        a_pass(model)

    assert counts == [2, *[1] * (len(counts) - 1)]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_curve_is_the_same_to_the_bit_however_many_layers_recompute(
    base: Path, tmp_path: Path, method: str
) -> None:
    curves = []
    for name, recompute, layers in (("none", False, None), ("two", True, 2), ("all", True, None)):
        spec = make_spec(
            tmp_path / name,
            model=base,
            adapter={"method": method},
            training={"num_train_epochs": 1, "learning_rate": 0.001},
            gradient_checkpointing=recompute,
            gradient_checkpointing_layers=layers,
        )
        code, events = run(spec, tmp_path / name / "out")
        assert code == EXIT_DONE, events[-1]
        curves.append(losses(events))

    assert curves[0] == curves[1] == curves[2]
