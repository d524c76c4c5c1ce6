"""Tests whether the loaded model keeps packed rows apart, by running it once on a few tokens.

A packed row must not change when the row before it does. Some families of transformers 5.23 build their masks without
positions: a packed row then sees the row before it, and the loss stays plausible. No config and no class name tells.
Those known are listed in `shared/contract/families.py`; a family nobody has listed is judged by what it does.
"""

from __future__ import annotations

from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from worker.train import row_attention

_TOKENS: Final = 6  # of each of the two rows
# Both passes have one shape, so kernels round alike; only experts may sum their tokens in another order. Of the largest
# logit of the second row: rounding stays below; leaks of random models were 0.07 to 1.4 (Bloom's, 0.005, is listed).
_ROUNDING: Final[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_KNOWN: Final = WeakKeyDictionary[Any, float]()


@torch.no_grad()
def leak_between_rows(model: Any) -> float:
    """By how much a packed row's logits change with the row before it, as a part of the largest of them; about 0."""
    vocabulary, device = model.config.get_text_config().vocab_size, model.get_input_embeddings().weight.device
    first = torch.arange(_TOKENS) * 7 % vocabulary
    other = (torch.arange(_TOKENS) * 11 + 3) % vocabulary
    second = (torch.arange(_TOKENS) * 5 + 1) % vocabulary
    seen, changed = (_second_row(model, torch.cat([row, second]).to(device)) for row in (first, other))
    return float((seen - changed).abs().max() / seen.abs().max().clamp_min(1e-9))


def rows_leak(model: Any) -> bool:
    """Whether that is more than rounding."""
    dtype = model.dtype if model.dtype in _ROUNDING else torch.bfloat16
    leak = _KNOWN.get(model)
    return (leak_between_rows(model) if leak is None else leak) > _ROUNDING[dtype]


def know(model: Any, leak: float) -> None:
    """Spare the try: it was made before, with these very weights."""
    _KNOWN[model] = leak


def _second_row(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (_TOKENS, vocabulary) of the second of two rows end to end, by the road that training takes."""
    reads = {"position_ids": torch.arange(_TOKENS, device=ids.device).repeat(2)[None]}
    if model.config._attn_implementation == row_attention.NAME:
        starts = torch.tensor([0, _TOKENS, 2 * _TOKENS])
        reads[row_attention.ROW_STARTS] = starts
        if ids.device.type == "cuda":  # the very kernel of this GPU
            reads[row_attention.STARTS_ON_DEVICE] = starts.int().to(ids.device)
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False, **reads).logits
    return logits[0, _TOKENS:].float()
