"""Which implementation of attention a base model is loaded with: the fastest that its class says it computes.

A class without `_supports_sdpa` needs what torch's product cannot do: Gemma 2 caps its scores, gpt-oss lets them flow
into sinks. `scaled_dot_product_attention` would leave that out, and an implementation registered by name, as ours for
packed rows is, escapes transformers' own check and would leave it out silently.
"""

from __future__ import annotations

from typing import Any, Final

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from shared.contract.spec import DeviceKind
from worker.train import row_attention

EAGER: Final = "eager"


def attention_for(config: Any, *, device: DeviceKind) -> str:
    """The name to load a model of `config` with.

    Rows attend apart on a CPU in every family that lets attention be chosen by name. `flex_attention` has no backward
    pass on a CPU (torch 2.13), so there it is no choice.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None or family._supports_sdpa:
        apart = device == "cpu" and family is not None and family.is_backend_compatible()
        return row_attention.register() if apart else "sdpa"
    return "flex_attention" if device == "cuda" and family._supports_flex_attn else EAGER
