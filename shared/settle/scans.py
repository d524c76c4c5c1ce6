"""Memory of layers that carry state along the sequence: the tensors they keep for the backward pass. Pure.

Without kernels of CUDA's (mamba_ssm, flash-linear-attention: no dependency of this project) transformers computes them
by PyTorch alone, chunk by chunk and in float32, and autograd keeps what lies between. Counted from the tensors that it
saves in transformers 5.23's own layers (`tests/train/test_sequence_state.py`), for the shapes that published models
have: states of 128, heads of 64 and chunks of 256 in Mamba 2, heads of 128 in the gated delta rule, states of 16 in
the first Mamba.
"""

from __future__ import annotations

from typing import Final

from shared.contract.base_facts import ModelFacts
from shared.contract.families import BLIND_TO_POSITIONS, Scan, scan_of

# Bytes that a layer keeps of a token, for each unit of attention's width.
_DELTA_RULE: Final = 91
# The same for each unit of the hidden size; Mamba has twice as many channels.
_BY_HIDDEN: Final[dict[Scan | None, int]] = {"mamba2": 280, "mamba": 490}


def scan_bytes(facts: ModelFacts) -> int:
    """Bytes that such a layer keeps per token; 0 for bases without, and for short convolutions, which keep little."""
    if facts.carries_state is None or facts.carries_state in BLIND_TO_POSITIONS:
        return 0
    scan = scan_of(facts.architecture)
    if scan == "delta_rule":
        return _DELTA_RULE * facts.num_attention_heads * facts.head_dim
    return _BY_HIDDEN.get(scan, 0) * facts.hidden_size
