"""Which base models would let packed rows leak into each other, read from config.json.

Attention sees where a packed row begins, by its positions. A convolution, a state space or a linear attention runs on
from the row before: packed rows would leak into each other, and the loss would look plausible. So it does in families
whose attention does not look at positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shared.contract.families import APART, BLIND_TO_POSITIONS, CARRY_STATE

# Keys that list the kind of each layer: most families, Nemotron-H and Zamba, RecurrentGemma.
_KINDS: Final = ("layer_types", "layers_block_type", "block_types", "_block_types")
# Keys of families whose config lists no kinds: they give the sizes of what carries state, or say where it stands.
_SIZES: Final = re.compile(
    r"^(mamba_|ssm_|linear_(num|key|value|conv)|lru_|conv_(kernel|L_cache|bias)|short_?conv|time_step_|state_size"
    r"|hybrid_override_pattern|linear_attn_config|full_attn_idxs|full_attention_interval|attn_layer_(indices|period))"
)


def carried_state(config: Mapping[str, Any]) -> str | None:
    """The kind of layer, family or key by which packed rows would see each other; None if they are kept apart.

    Args:
        config: a transformers config.json; of a model with several parts, the text part counts.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return carried_state({"architectures": config.get("architectures"), **text})
    blind = str(config["model_type"]) if config.get("model_type") in BLIND_TO_POSITIONS else None
    kinds = [str(kind) for name in _KINDS for kind in _listed(config.get(name))]
    if kinds:
        return next((kind for kind in kinds if kind not in APART), blind)
    if blind:
        return blind
    named = (name for name in _names(config) if CARRY_STATE.search(name))
    return next(named, None) or next((key for key in config if _SIZES.search(key)), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (str(name) for name in (config.get("model_type"), *_listed(config.get("architectures"))) if name)
