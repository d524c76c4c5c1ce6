"""Memory of layers that carry state along the sequence: the tensors they keep for the backward pass. Pure.

Without kernels of CUDA's (mamba_ssm, flash-linear-attention: no dependency of this project) transformers computes them
by PyTorch alone, chunk by chunk and in float32, and autograd keeps what lies between. Counted from the tensors that it
saves in transformers 5.23's own layers (`tests/train/test_sequence_state.py`), for the shapes that published models
have: states of 128, heads of 64 and chunks of 256 in Mamba 2, heads of 128 in the gated delta rule, states of 16 in
the first Mamba.
"""

from __future__ import annotations

import re
from typing import Final

from shared.contract.base_facts import ModelFacts
from shared.contract.families import BLIND_TO_POSITIONS

# Bytes that a layer keeps of a token, for each unit of attention's width.
_DELTA_RULE: Final = 91
_BY_ATTENTION: Final = re.compile(r"Qwen3_5|Qwen3Next|OlmoHybrid|KimiLinear")
# The same for each unit of the hidden size; Mamba has twice as many channels.
_MAMBA2: Final = 280
_MAMBA2_NAMES: Final = re.compile(r"GraniteMoeHybrid|Bamba|FalconH1|NemotronH|Zamba2|Mamba2")
_MAMBA: Final = 490
_MAMBA_NAMES: Final = re.compile(r"Mamba|Jamba|Zamba")


def scan_bytes(facts: ModelFacts) -> int:
    """Bytes that such a layer keeps per token; 0 for bases without, and for short convolutions, which keep little."""
    if facts.carries_state is None or facts.carries_state in BLIND_TO_POSITIONS:
        return 0
    if _BY_ATTENTION.match(facts.architecture):
        return _DELTA_RULE * facts.num_attention_heads * facts.head_dim
    if _MAMBA2_NAMES.match(facts.architecture):
        return _MAMBA2 * facts.hidden_size
    return _MAMBA * facts.hidden_size if _MAMBA_NAMES.search(facts.architecture) else 0
