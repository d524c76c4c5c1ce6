"""Rows are not packed where a model carries state from one row into the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, MambaConfig, Qwen3_5TextConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.settle.model_facts import facts_of
from shared.settle.scans import scan_bytes
from tests.train.families import make_family
from tests.train.tiny import chat_rows, losses, make_spec, run
from worker.train.sequence_state import carries_state

# PEFT looks for the experts' ranks among modules, and finds them among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

# What the spec of these tests says of the base is a Llama's: only the loaded model can tell.
CARRYING = ("granitemoehybrid", "lfm2", "qwen3_next")


@pytest.mark.parametrize("family", CARRYING)
def test_rows_of_a_base_that_carries_state_are_trained_apart_and_the_user_is_told(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path, family)
    settings = {"model": base, "rows": chat_rows(8)}

    apart = run(make_spec(tmp_path / "apart", **settings, training={"packing": False}), tmp_path / "apart" / "out")
    asked = run(make_spec(tmp_path / "packed", **settings, training={"packing": True}), tmp_path / "packed" / "out")

    assert (apart[0], asked[0]) == (EXIT_DONE, EXIT_DONE)
    assert losses(asked[1]) == losses(apart[1])
    told = [event.message for event in asked[1] if event.type == "message" and event.level == "warn"]
    packing = [message for message in told if message.startswith("Packing")]
    assert len(packing) == 1
    assert packing[0].startswith("Packing is off: packed rows would leak into each other")
    assert [event.sequences for event in asked[1] if event.type == "started"] == [8]


def test_packing_that_was_asked_for_is_refused_where_rows_would_leak(tmp_path: Path) -> None:
    base = make_family(tmp_path, "lfm2")

    code, events = run(make_spec(tmp_path, model=base, packing_asked=True), tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert (events[-1].type, events[-1].param) == ("failed", "tunepool.training.packing")
    assert "conv layers" in events[-1].message


def test_a_model_that_only_attends_is_packed_as_asked(model: Path, tmp_path: Path) -> None:
    code, events = run(make_spec(tmp_path, model=model, packing_asked=True, rows=chat_rows(8)), tmp_path / "out")

    assert code == EXIT_DONE
    assert [event.type for event in events].count("message") == 0
    assert next(event.sequences for event in events if event.type == "started") < 8


class _Config:
    """Of a family that lists no kinds of layers."""

    def get_text_config(self) -> _Config:
        return self


class _Unlisted(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.config = _Config()
        self.layers = nn.ModuleDict(layers)


def _layer(name: str) -> Any:
    made: type[nn.Module] = type(name, (nn.Module,), {})
    return made()


@pytest.mark.parametrize(
    "name",
    [
        "FooMambaMixer",
        "BarShortConv",
        "Rwkv7TimeMix",
        "NewGatedDeltaNet",
        "XLightningAttention",
        "BazRGLRU",
        "mLSTMCell",
    ],
)
def test_an_unlisted_family_is_known_by_the_classes_of_its_modules(name: str) -> None:
    assert carries_state(_Unlisted(attend=_layer("LlamaAttention"), mix=_layer(name))) == name


def test_a_convolution_along_the_sequence_is_known_whatever_its_parent_is_called() -> None:
    assert carries_state(_Unlisted(mix=nn.Conv1d(4, 4, 3))) == "Conv1d"


def test_an_unlisted_family_that_only_attends_is_packed() -> None:
    layers = {"mlp": _layer("GptOssMLP"), "attention": _layer("Attention"), "audio_tower": nn.Conv1d(4, 4, 3)}

    assert carries_state(_Unlisted(**layers)) is None


def test_a_family_whose_config_lists_no_layer_types_is_known_once_it_is_built(tmp_path: Path) -> None:
    base = make_family(tmp_path, "recurrent_gemma")
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    assert carries_state(network) is not None


def _saved_per_token(layer: nn.Module, *, width: int, tokens: int = 512) -> float:
    """Bytes that autograd keeps of a frozen layer in bfloat16 for the backward pass, per token."""
    layer.to(torch.bfloat16).requires_grad_(requires_grad=False)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own) / tokens


def _delta_rule() -> tuple[nn.Module, Any]:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = Qwen3_5TextConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, **heads)
    return Qwen3_5GatedDeltaNet(config, 0), config


def _second_mamba() -> tuple[nn.Module, Any]:
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 128}
    config = GraniteMoeHybridConfig(hidden_size=128, num_hidden_layers=1, mamba_n_groups=1, **sizes)
    return GraniteMoeHybridMambaLayer(config, 0), config


def _first_mamba() -> tuple[nn.Module, Any]:
    config = MambaConfig(hidden_size=64, state_size=16, time_step_rank=8, num_hidden_layers=1)
    return MambaMixer(config, 0), config


@pytest.mark.parametrize(
    ("make", "architecture"),
    [
        (_delta_rule, "Qwen3_5ForConditionalGeneration"),
        (_second_mamba, "GraniteMoeHybridForCausalLM"),
        (_first_mamba, "MambaForCausalLM"),
    ],
)
def test_the_estimate_counts_what_a_scan_keeps_for_the_backward_pass(make: Any, architecture: str) -> None:
    layer, config = make()
    facts = facts_of({**json.loads(config.to_json_string()), "architectures": [architecture]}, name="m")

    kept = _saved_per_token(layer, width=config.hidden_size, tokens=256 if architecture.startswith("Mamba") else 512)

    assert kept <= 1.05 * scan_bytes(facts), kept
    assert scan_bytes(facts) <= 1.25 * kept, kept
