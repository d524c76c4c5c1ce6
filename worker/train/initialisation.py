"""Starts of an adapter that need more than PEFT's constructor: EVA, LoftQ, and what PiSSA and OLoRA leave to undo."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.contract.spec import Adapter
from worker.train.data import Row

WEIGHTS = "adapter_model.safetensors"

# These move part of the base weights into the adapter; the product is converted to fit the untouched base.
MUTATING_INITS = frozenset({"pissa", "olora"})

EVA_ROWS, EVA_ROWS_AT_ONCE = 256, 8


def finish(model: PeftModel, adapter: Adapter, *, base: Path, initial: Path | None, rows: Sequence[Row]) -> None:
    """Complete the start that `adapter.init_lora_weights` names; nothing to do where PEFT's constructor did."""
    if adapter.init_lora_weights == "eva":
        initialize_lora_eva_weights(model, eva_batches(rows, device=model.device), show_progress_bar=False)
    elif adapter.init_lora_weights == "loftq":
        start_with_quantization_error(model, base=base)
    elif adapter.init_lora_weights in MUTATING_INITS and initial is not None:
        model.save_pretrained(str(initial), save_embedding_layers=False)


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
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank, root = module.r["default"], values.sqrt()
        module.lora_A["default"].weight.copy_(root[:rank, None] * right[:rank])
        module.lora_B["default"].weight.copy_(left[:, :rank] * root[:rank] / module.scaling["default"])


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
