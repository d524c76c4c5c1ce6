"""Which implementation of attention a base model is loaded with: the fastest that its class says it computes.

A class without `_supports_sdpa` needs what torch's product cannot do: Gemma 2 caps its scores, gpt-oss lets them flow
into sinks. `scaled_dot_product_attention` would leave that out, and an implementation registered by name, as ours for
packed rows is, escapes transformers' own check and would leave it out silently. So would a class that asks for names
itself: DeepSeek V3.2 applies the choice of its indexer where the name is `eager` or `sdpa`, and attends to everything
elsewhere.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from shared.contract.spec import DeviceKind
from worker.train import row_attention

EAGER: Final = "eager"
_ASKS_FOR_NAMES: Final = re.compile(r"_attn_implementation (==|in) [^\n]*[\"']sdpa[\"']")


def attention_for(config: Any, *, device: DeviceKind, row_wise: bool = True) -> str:
    """The name to load a model of `config` with.

    Packed rows attend apart, if they shall (`row_wise`), in every family that lets attention be chosen by name.
    `flex_attention` has no backward pass on a CPU (torch 2.13), so there it is no choice.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None or family._supports_sdpa:
        apart = family is not None and family.is_backend_compatible() and not asks_for_names(family)
        return row_attention.register() if apart and row_wise else "sdpa"
    return "flex_attention" if device == "cuda" and family._supports_flex_attn else EAGER


@cache
def asks_for_names(family: type) -> bool:
    """Whether the modelling code of a class does something else where attention has a name that it does not know."""
    file = sys.modules[family.__module__].__file__
    return file is not None and _ASKS_FOR_NAMES.search(Path(file).read_text(encoding="utf-8")) is not None
