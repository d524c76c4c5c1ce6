# ruff: noqa: N803, N806 -- shape suffixes, legend below
"""A job that goes on from a tuned model: its adapter as the start, or as a part of the frozen model.

Merged into 4-bit weights an update would be rounded to 4 bits, and into 16-bit weights to 16. So it stays beside its
frozen layer and is added to that layer's output: the same function, unrounded, below the new adapter. Switching the
new adapter off leaves base and parent. A preference objective takes these two as its reference. The product is one
adapter for the base as published: both updates as one of rank R1 + R2, exactly.

Shapes: N = positions, I = inputs, O = outputs, R = rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, pad

from shared.contract.spec import AttemptSpec
from shared.errors import Invalid

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_PREFIX: Final = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def begins_as(spec: AttemptSpec) -> Path | None:
    """The directory of the parent whose adapter is trained on; None: the job makes a new one."""
    parent = spec.job.parent
    return Path(spec.parent_path or "") if parent is not None and parent.init_from == "continue" else None


def stands_on(spec: AttemptSpec) -> Path | None:
    """The directory of the parent that a new adapter is trained on top of."""
    parent = spec.job.parent
    return Path(spec.parent_path or "") if parent is not None and parent.init_from == "merged" else None


def continue_adapter(model: PeftModel, folder: Path) -> None:
    """Give the untrained adapter of `model` the parent's weights.

    Raises:
        Invalid: `parent_does_not_fit`, its tensors are not those of this adapter.
    """
    try:
        outcome = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise _unfit(str(error).splitlines()[-1].strip()) from error
    lacking = [name for name in outcome.missing_keys if ".default" in name]
    if lacking or outcome.unexpected_keys:
        raise _unfit(f"{[*lacking, *outcome.unexpected_keys][0]} is on one side only")


def _unfit(why: str) -> Invalid:
    return Invalid(
        f"The adapter of the tuned model does not fit this job's: {why[:300]}. Use tunepool.adapter.init_from merged.",
        code="parent_does_not_fit",
        param="model",
    )


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter adds to one layer: scale · B · A."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]


def updates(folder: Path) -> dict[str, LayerUpdate]:
    """Path of a module in the base model -> its update, of a plain LoRA directory.

    Raises:
        Invalid: `parent_not_plain`, the adapter has more than A and B matrices.
    """
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    paths = [name.removeprefix(_PREFIX).removesuffix(_A) for name in tensors if name.endswith(_A)]
    if len(tensors) != 2 * len(paths) or config.get("use_dora"):
        odd = next((name for name in tensors if not name.endswith((_A, _B))), "DoRA's magnitudes")
        raise Invalid(
            f"The adapter of the tuned model is no plain LoRA ({odd}); use tunepool.adapter.init_from continue.",
            code="parent_not_plain",
            param="model",
        )
    return {path: _update(tensors, config, path) for path in paths}


def _update(tensors: dict[str, torch.Tensor], config: dict[str, Any], path: str) -> LayerUpdate:
    A_RI, B_OR = tensors[f"{_PREFIX}{path}{_A}"].float(), tensors[f"{_PREFIX}{path}{_B}"].float()
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
    rank = A_RI.shape[0]
    return LayerUpdate(A_RI, B_OR, scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


class FrozenUpdate(torch.nn.Module):
    """Adds a frozen update to what its layer answers."""

    def __init__(self, update: LayerUpdate) -> None:
        super().__init__()
        self.scale = update.scale
        self.A_RI = torch.nn.Parameter(update.A_RI, requires_grad=False)
        self.B_OR = torch.nn.Parameter(update.B_OR, requires_grad=False)

    def added(self, _layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], y_NO: torch.Tensor) -> torch.Tensor:
        """A forward hook of torch: what the layer answers instead of `y_NO`."""
        x_NI = inputs[0] if torch.is_autocast_enabled(y_NO.device.type) else inputs[0].to(self.A_RI.dtype)
        return y_NO + (linear(linear(x_NI, self.A_RI), self.B_OR) * self.scale).to(y_NO.dtype)


FROZEN: Final = "parent_update"  # the name of the update below its layer


def put_beneath(model: torch.nn.Module, folder: Path) -> None:
    """Make the parent's update a part of the frozen `model`, which has no adapter yet."""
    for path, update in updates(folder).items():
        layer: Any = model.get_submodule(path)
        frozen = FrozenUpdate(update).to(layer.weight.device)
        layer.add_module(FROZEN, frozen)
        layer.register_forward_hook(frozen.added)


def frozen_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Those of the parent that stay as they are, in float32 beside a base of another type."""
    return {
        parameter for module in model.modules() if isinstance(module, FrozenUpdate) for parameter in module.parameters()
    }


def join_parent(folder: Path, *, parent: Path) -> None:
    """Rewrite the saved adapter in `folder` as the sum of the parent's and its own, for the base without the parent.

    [A1; A2] and [s1·B1, s2·B2] at scale 1; ranks below the largest are filled up with zeros, so that one rank holds for
    every module and every server that takes LoRA takes it.
    """
    below, above = updates(parent), updates(folder)
    if below.keys() != above.keys():
        raise AssertionError(f"both adapt the same modules: {sorted(below.keys() ^ above.keys())[:3]}")
    ranks = [max(update.rank for update in each.values()) for each in (below, above)]
    tensors: dict[str, torch.Tensor] = {}
    for path in above:
        pairs = list(zip((below[path], above[path]), ranks, strict=True))
        A_RI = torch.cat([pad(update.A_RI, (0, 0, 0, rank - update.rank)) for update, rank in pairs])
        B_OR = torch.cat([pad(update.scale * update.B_OR, (0, rank - update.rank)) for update, rank in pairs], dim=1)
        tensors[f"{_PREFIX}{path}{_A}"], tensors[f"{_PREFIX}{path}{_B}"] = A_RI.contiguous(), B_OR.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "init_lora_weights": True}
    file.write_text(json.dumps({**config, "rank_pattern": {}, "alpha_pattern": {}}), encoding="utf-8")


def merged_into(model: torch.nn.Module, folder: Path) -> Any:
    """The base with the parent's adapter in its weights: where every weight trains, in float32."""
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).merge_and_unload()
