"""Our own LoRA layer must be PEFT's, only faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit

from shared.contract.spec import AttemptSpec
from tests.train.families import make_family
from tests.train.tiny import make_spec
from worker.train import cpu_kernels
from worker.train.base_model import load_model
from worker.train.cpu_parts import use_kernels
from worker.train.fused_lora import FusedLinear4bit, JoinedLinear4bit, KeptLinear4bit
from worker.train.methods import adapt
from worker.train.shared_base import tree_over


def adapted(tmp_path: Path, model: Path, *, keep: bool = False, dtype: str = "bfloat16", **adapter: Any) -> Any:
    file = make_spec(
        tmp_path,
        model=model,
        adapter={"method": "qlora", **adapter},
        training={"dtype": dtype},
        quantization={"bnb_4bit_compute_dtype": dtype},
        keep_dequantized=keep,
    )
    spec = AttemptSpec.model_validate_json(file.read_bytes())
    base = load_model(spec, weights=model, quantized=True, trains_in_full=False)
    return adapt(base, spec=spec, initial=None, rows=[])


def layer_of(network: Any) -> Any:
    layer = next(module for module in network.modules() if isinstance(module, FusedLinear4bit))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return layer


def outcome(layer: Any, forward: Any, *, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 9, layer.in_features, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = forward(x)
    y.float().square().sum().backward()
    learned = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found = [y.detach(), x.grad, *[weight.grad for weight in learned]]
    for weight in learned:
        weight.grad = None
    return [tensor.float() for tensor in found]


@pytest.mark.parametrize("keep", [False, True], ids=["expanded each time", "kept"])
@pytest.mark.parametrize("scaling", [{}, {"lora_alpha": 12, "use_rslora": True}], ids=["alpha is r", "scaled"])
def test_values_and_gradients_are_those_of_pefts_layer(
    tmp_path: Path, model: Path, keep: bool, scaling: dict[str, Any]
) -> None:
    layer = layer_of(adapted(tmp_path, model, keep=keep, **scaling))
    assert isinstance(layer, KeptLinear4bit) == keep

    ours = outcome(layer, layer)
    pefts = outcome(layer, lambda x: Linear4bit.forward(layer, x))

    for one, other in zip(ours, pefts, strict=True):
        # bfloat16 rounds once here and after every operation there.
        assert (one - other).norm() < 0.01 * other.norm()


def test_in_float32_they_are_pefts_to_the_order_of_the_sums(tmp_path: Path, model: Path) -> None:
    layer = layer_of(adapted(tmp_path, model, dtype="float32", lora_alpha=12))
    assert layer._plain_adapter(torch.zeros(1, layer.in_features)) == "default"

    ours = outcome(layer, layer, dtype=torch.float32)
    pefts = outcome(layer, lambda x: Linear4bit.forward(layer, x), dtype=torch.float32)

    for one, other in zip(ours, pefts, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    layer.base_layer.compute_dtype = torch.bfloat16  # asked for: PEFT's layer would round what comes in
    assert layer._plain_adapter(torch.zeros(1, layer.in_features)) is None


def test_the_frozen_bias_of_a_base_is_added_as_pefts_layer_adds_it(tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen2")
    network = adapted(tmp_path, base)
    layers = (module for module in network.modules() if isinstance(module, FusedLinear4bit))
    layer = next(layer for layer in layers if layer.base_layer.bias is not None)
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    torch.nn.init.normal_(layer.base_layer.bias)

    ours = outcome(layer, layer)
    pefts = outcome(layer, lambda x: Linear4bit.forward(layer, x))

    with torch.autocast("cpu", torch.bfloat16):
        assert layer._plain_adapter(torch.zeros(1, 1, layer.in_features, dtype=torch.bfloat16)) == "default"
        layer.base_layer.bias.requires_grad_(requires_grad=True)  # it learns: its gradient is PEFT's to find
        assert layer._plain_adapter(torch.zeros(1, 1, layer.in_features, dtype=torch.bfloat16)) is None
    for one, other in zip(ours, pefts, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_what_is_not_plain_goes_pefts_way(tmp_path: Path, model: Path) -> None:
    layer = layer_of(adapted(tmp_path, model, lora_dropout=0.1))
    x = torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16)
    plain = layer_of(adapted(tmp_path / "plain", model))

    with torch.autocast("cpu", torch.bfloat16):
        assert layer._plain_adapter(x) is None
        assert plain._plain_adapter(x) == "default"
        assert plain._plain_adapter(x.float()) is None
    assert plain._plain_adapter(x) is None


def test_a_switched_off_adapter_leaves_the_base_alone(tmp_path: Path, model: Path) -> None:
    network = adapted(tmp_path, model)
    layer = layer_of(network)
    x = torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16)

    with network.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_kept_weights_are_in_no_state(tmp_path: Path, model: Path) -> None:
    network = adapted(tmp_path, model, keep=True)
    before = set(network.state_dict())
    layer = layer_of(network)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16))

    assert layer.base_layer.weight._expanded is layer.expanded()
    assert set(network.state_dict()) == before


def test_kept_weights_are_kept_once_for_all_that_train_on_a_base(tmp_path: Path, model: Path) -> None:
    network = adapted(tmp_path, model, keep=True)

    first, second = (layer_of(tree_over(network)) for _ in range(2))

    assert first is not second
    assert first.expanded() is second.expanded()


def group_of(network: Any, *names: str) -> list[Any]:
    """The first layers of these names; their B are no zeros, and no two adapters scale alike."""
    layers = [next(layer for path, layer in network.named_modules() if path.endswith(name)) for name in names]
    for number, layer in enumerate(layers):
        assert isinstance(layer, JoinedLinear4bit)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        layer.scaling["default"] = 0.5 + number
    return layers


@pytest.mark.parametrize(("dtype", "relative"), [("bfloat16", 0.01), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")], ids=["attention", "gates"]
)
@pytest.mark.parametrize("pattern", [{}, {"v_proj": 4, "up_proj": 4}], ids=["one rank", "several ranks"])
def test_layers_that_answer_together_answer_and_learn_as_pefts(  # noqa: PLR0917 -- pytest
    tmp_path: Path, model: Path, names: tuple[str, ...], dtype: str, relative: float, pattern: dict[str, int]
) -> None:
    layers = group_of(adapted(tmp_path, model, keep=True, dtype=dtype, rank_pattern=pattern), *names)
    number_type = getattr(torch, dtype)
    learned = [
        weight for layer in layers for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    ]

    def outcome_of(ask: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        x = torch.randn(2, 9, layers[0].in_features, dtype=number_type, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            y = ask(x)
        return [each.float() for each in (y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *learned]))]

    ours = outcome_of(lambda x: layers[0].together(layers[1:], x))
    pefts = outcome_of(lambda x: torch.cat([Linear4bit.forward(layer, x) for layer in layers], dim=-1))

    for one, other in zip(ours, pefts, strict=True):
        assert (one - other).norm() < relative * other.norm()
    parts = [layer.expanded() for layer in layers]
    assert {part.untyped_storage().data_ptr() for part in parts} == {parts[0].untyped_storage().data_ptr()}


def test_layers_answer_each_by_itself_where_one_of_them_is_not_plain(tmp_path: Path, model: Path) -> None:
    network = adapted(tmp_path, model, keep=True, dtype="float32")
    first, *others = group_of(network, "q_proj", "k_proj", "v_proj")
    x = torch.randn(1, 4, first.in_features)

    assert first.together(others, x) is not None
    assert first.together([*others, torch.nn.Linear(4, 4)], x) is None
    with network.disable_adapter():
        assert first.together(others, x) is None
    watch = others[1].register_forward_hook(lambda *_given: None)
    assert first.together(others, x) is None
    watch.remove()
    assert first.together(others, x) is not None
    others[0].base_layer.bias = torch.nn.Parameter(torch.zeros(others[0].out_features), requires_grad=False)
    assert first.together(others, x) is None


# In bfloat16 either way rounds by itself, layer upon layer: they were 2.1 % apart.
@pytest.mark.parametrize(("dtype", "relative"), [("bfloat16", 0.04), ("float32", 1e-5)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_family_asks_its_layers_together_and_learns_the_same(
    tmp_path: Path, name: str, dtype: str, relative: float
) -> None:
    if cpu_kernels.load() is None:
        pytest.skip("no C compiler here")
    base = make_family(tmp_path, name)
    network = adapted(tmp_path, base, keep=True, dtype=dtype, lora_alpha=12)
    use_kernels(network)
    for path, weight in network.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(weight, std=0.05)
    learned = {path: weight for path, weight in network.named_parameters() if weight.requires_grad}
    ids = torch.arange(40)[None] % 37
    outcomes = []
    for together in (JoinedLinear4bit.together, lambda *_given: None):
        with (
            patch.object(JoinedLinear4bit, "together", autospec=True, side_effect=together) as asked,
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(learned.values()))
        assert asked.call_count == 2 * network.config.num_hidden_layers
        outcomes.append([loss.detach()[None].float(), *(grad.float() for grad in grads)])

    for path, one, other in zip(["loss", *learned], *outcomes, strict=True):
        assert (one - other).norm() <= relative * other.norm() + 1e-7, path
