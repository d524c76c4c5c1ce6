"""Our own LoRA layer must be PEFT's, only faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit

from shared.contract.spec import AttemptSpec
from tests.train.families import make_family
from tests.train.tiny import make_spec
from worker.train.base_model import load_model
from worker.train.fused_lora import FusedLinear4bit, KeptLinear4bit
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
