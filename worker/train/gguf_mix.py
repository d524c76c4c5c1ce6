"""Which number format each tensor of a mixed file has: the choice of llama.cpp's `llama_tensor_get_type`.

`q4_k_m` stores most weights in 4 bits, and in 6 those that answers depend on most: the output layer, and in some layers
the values of attention and the way down of the feed-forward. K formats have blocks of 256 numbers; a row that has no
whole ones gets the next wider format with blocks of 32, as there.
"""

from __future__ import annotations

import re
from typing import Final

from gguf import GGMLQuantizationType as Kind

_LAYER: Final = re.compile(r"^blk\.(\d+)\.(attn_v|ffn_down)\.weight$")
_BLOCK: Final = 256
_WITHOUT_BLOCKS: Final = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}


def q4_k_m(name: str, width: int, *, layers: int, tied: bool) -> Kind:
    """The format of a matrix whose rows have `width` numbers. `tied`: the embedding is the output layer as well."""
    wanted = Kind.Q6_K if _matters(name, layers=layers, tied=tied) else Kind.Q4_K
    return wanted if width % _BLOCK == 0 else _WITHOUT_BLOCKS[wanted]


def _matters(name: str, *, layers: int, tied: bool) -> bool:
    if name == ("token_embd.weight" if tied else "output.weight"):
        return True
    layer = _LAYER.match(name)
    return layer is not None and _takes_more_bits(int(layer[1]), layers)


def _takes_more_bits(layer: int, layers: int) -> bool:
    """The first eighth, the last one, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
