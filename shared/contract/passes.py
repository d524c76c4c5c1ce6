"""How rows are laid into forward passes, and what a device holds for them. Estimate and trainer both read this."""

from __future__ import annotations

from typing import Final

from shared.contract.objectives import OBJECTIVES
from shared.contract.spec import DeviceKind, JobSpec

# Each forward pass has a cost that does not depend on its tokens, and activations take memory for each of them.
# Rows attend apart (worker/train/row_attention.py), so what limits a pack is memory. Measured on 2 cores with a 135M
# model: packs of 1,024 take 1 GiB more than packs of 512. On CUDA a mask is made all the same, for layers that need
# one, and its square bounds a pass (8,192: 200 MB while it is made). A longer row has a pass to itself.
PACKED_TOKENS: Final[dict[DeviceKind, int]] = {"cpu": 1024, "cuda": 8192}

# Of a CPU's memory, for frozen 4-bit weights in 16 bits too (worker/train/fused_lora.py): half of what the plan leaves
# free.
KEPT_SHARE: Final = 0.05


def is_packed(spec: JobSpec) -> bool:
    """Whether rows share sequences. NEFTune scales its noise by a sequence's length: such rows would get too little."""
    training = spec.training
    return training.packing and training.neftune_noise_alpha is None and OBJECTIVES[spec.objective.type].may_pack


def device_kind(kind: str) -> DeviceKind:
    """A device's kind as torch names it: an AMD GPU ("rocm") is "cuda" to torch as well."""
    return "cpu" if kind == "cpu" else "cuda"
