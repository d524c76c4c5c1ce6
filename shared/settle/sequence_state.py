"""Which base models would let packed rows leak into each other, read from config.json.

Attention sees where a packed row begins, by its positions. A convolution, a state space or a linear attention runs on
from the row before: packed rows would leak into each other, and the loss would look plausible. So it does in families
whose attention does not look at positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shared.contract.families import BLIND_TO_POSITIONS

# Kinds of layers that keep packed rows apart, under their names of today and of older configs. Only these: of a kind
# that is new to us nothing is known.
_APART: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "moe", "mlp"})
# Keys that list the kind of each layer: most families, Nemotron-H and Zamba, RecurrentGemma.
_KINDS: Final = ("layer_types", "layers_block_type", "block_types", "_block_types")
# Keys of families whose config lists no kinds: they give the sizes of what carries state, or say where it stands.
_SIZES: Final = re.compile(
    r"^(mamba_|ssm_|linear_(num|key|value|conv)|lru_|conv_(kernel|L_cache|bias)|short_?conv|time_step_|state_size"
    r"|hybrid_override_pattern|linear_attn_config|full_attn_idxs|full_attention_interval|attn_layer_(indices|period))"
)
_FAMILIES: Final = re.compile(
    r"mamba|rwkv|recurrent|lstm|lfm|bamba|jamba|zamba|zaya|falcon_?h1|nemotron_?h|qwen3_?next|qwen3_?5|qwen4|kimi_?linear"
    r"|granite_?moe_?hybrid|olmo_?hybrid|bailing_?hybrid|inkling|hybrid|retnet|hyena",
    re.IGNORECASE,
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
        return next((kind for kind in kinds if kind not in _APART), blind)
    if blind:
        return blind
    named = (name for name in _names(config) if _FAMILIES.search(name))
    return next(named, None) or next((key for key in config if _SIZES.search(key)), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (str(name) for name in (config.get("model_type"), *_listed(config.get("architectures"))) if name)
