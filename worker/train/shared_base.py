"""One base in memory under several adapters.

Each gets a tree of modules of its own over the very same frozen weights. PEFT, TRL and accelerate change modules as
they please (layers replaced, hooks, forwards wrapped for autocast, which adapter is active), and none of it reaches
another tree. So a trainee runs through the code that a job alone runs through, to the bit. A tree costs
Python objects, a few kilobytes a layer. Adapters beside each other in one PEFT model would share all those switches.
"""

from __future__ import annotations

import copy
from typing import Any


def tree_over(base: Any) -> Any:
    """A copy of `base` in all but its weights. Buffers are copied: some models write into theirs."""
    shared: dict[int, Any] = {}
    for module in base.modules():
        for weight in module.parameters(recurse=False):
            shared[id(weight)] = weight
            # bitsandbytes: blocks' scales, as large as an eighth of the weights.
            if (state := getattr(weight, "quant_state", None)) is not None:
                shared[id(state)] = state
    return copy.deepcopy(base, shared)
