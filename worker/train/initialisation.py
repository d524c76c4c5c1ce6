"""Starts of an adapter that need more than PEFT's constructor: EVA, LoftQ, and what PiSSA and OLoRA leave to undo.

A whole decomposition of a wide layer takes seconds, and a model has hundreds of layers: there PiSSA and LoftQ look for
the directions that the adapter's rank has room for, and no others (arXiv 0909.4061, algorithm 4.4).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import bitsandbytes.functional
import torch
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.contract.spec import Adapter
from worker.train.data import Row
from worker.train.targets import linear_modules

WEIGHTS = "adapter_model.safetensors"

# These move part of the base weights into the adapter; the product is converted to fit the untouched base.
MUTATING_INITS = frozenset({"pissa", "olora"})

EVA_ROWS, EVA_ROWS_AT_ONCE = 256, 8

# Up to this shorter side a layer is decomposed whole: one core takes 3 seconds for 1,024, 11 for 1,536.
WHOLE_SIDE: Final = 1024
# A rank above this part of the shorter side leaves nothing to save.
RANKS_PER_SIDE: Final = 8
# Passes over the matrix, as PiSSA's authors have it. Of white noise, the worst case, 16 directions of 1,536 then hold
# 98 % of what the best ones hold, and more than 99.5 % with twice the directions; of weights all of it.
PASSES: Final = 16


def finish(model: PeftModel, adapter: Adapter, *, base: Path, initial: Path | None, rows: Sequence[Row]) -> None:
    """Complete the start that `adapter.init_lora_weights` names; nothing to do where PEFT's constructor did."""
    if adapter.init_lora_weights == "eva":
        initialize_lora_eva_weights(model, eva_batches(rows, device=model.device), show_progress_bar=False)
    elif adapter.init_lora_weights == "loftq":
        start_with_quantization_error(model, base=base)
    elif adapter.init_lora_weights in MUTATING_INITS and initial is not None:
        model.save_pretrained(str(initial), save_embedding_layers=False)


def pissa_by_upstreams_name(model: torch.nn.Module, adapter: Adapter) -> str:
    """PEFT's name of the PiSSA start that this base takes, one for all its layers: whole, or its main directions."""
    sides = [min(layer.weight.shape) for layer in linear_modules(model).values()]
    rank = max(adapter.r, *adapter.rank_pattern.values(), 0)
    return "pissa" if is_decomposed_whole(max(sides, default=0), rank=rank) else f"pissa_niter_{PASSES}"


def is_decomposed_whole(side: int, *, rank: int) -> bool:
    """Whether a matrix of this shorter side is decomposed whole for its `rank` main directions."""
    return side <= WHOLE_SIDE or rank * RANKS_PER_SIDE > side


def main_directions(matrix: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest `rank` singular triples of an (m, n) float32 matrix: left (m, rank), values, right (rank, n)."""
    if is_decomposed_whole(min(matrix.shape), rank=rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:  # rounding errors are nearly white, so directions to spare
        left, values, columns = torch.svd_lowrank(matrix, q=2 * rank, niter=PASSES)
        right = columns.T
    return left[:, :rank], values[:rank], right[:rank]


def eva_batches(rows: Sequence[Row], *, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The first rows, padded: EVA looks at the activations they cause (arXiv 2410.07170)."""
    batches = []
    for start in range(0, min(len(rows), EVA_ROWS), EVA_ROWS_AT_ONCE):
        texts = [torch.as_tensor(row.text_ids) for row in rows[start : start + EVA_ROWS_AT_ONCE]]
        attended = [torch.ones_like(text) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        batches.append(
            {
                "input_ids": pad(texts, batch_first=True).long().to(device),
                "attention_mask": pad(attended, batch_first=True).long().to(device),
            }
        )
    return batches


@torch.no_grad()
def start_with_quantization_error(model: PeftModel, *, base: Path) -> None:
    """LoftQ with one iteration (arXiv 2310.08659): B A begins as the best rank-r picture of what 4 bits lose.

    PEFT's own `replace_lora_weights_loftq` computes on CUDA only and forgets the adapter's scale.
    """
    originals = WeightsOnDisk(base)
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        weight = module.get_base_layer().weight
        kept = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        original = originals[f"{name.removeprefix('base_model.model.')}.weight"]
        lost = original.to(kept.device, torch.float32).reshape(kept.shape) - kept
        left, values, right = main_directions(lost, rank=module.r["default"])
        root = values.sqrt()
        module.lora_A["default"].weight.copy_(root[:, None] * right)
        module.lora_B["default"].weight.copy_(left * root / module.scaling["default"])


class WeightsOnDisk(Mapping[str, torch.Tensor]):
    """The tensors of a model directory, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self._places = {name: file for file in self._files for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118 -- no mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._places[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def fit_to_untouched_base(folder: Path, *, initial: Path) -> None:
    """Rewrite a saved PiSSA or OLoRA adapter as an ordinary one of twice the rank.

    Training started from W - s B0 A0, so the whole is W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]. Same identity as
    PEFT's `subtract_mutated_init`, without loading a second adapter into a model that is being trained.
    """
    tensors, start = load_file(folder / WEIGHTS), load_file(initial / WEIGHTS)
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name], start[name]], dim=0).contiguous()
        elif "lora_B" in name:
            tensors[name] = torch.cat([tensors[name], -start[name]], dim=1).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(_with_twice_the_rank(json.loads(file.read_text()))), encoding="utf-8")


def _with_twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    # The scale s must stay: alpha / r, or alpha / sqrt(r) for rsLoRA.
    growth = math.sqrt(2) if config["use_rslora"] else 2
    ranks = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    alphas = {name: growth * alpha for name, alpha in config["alpha_pattern"].items()}
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }
