"""The beginning that the rows of a packed pass have in common, most often their system text, is computed once.

What a model computes at a position depends on this and earlier tokens alone. So rows that begin alike have the same
keys and values there, and their gradients add up. A pass then reads the beginning once and behind it the rest of every
row, which attends to both (`row_attention.py`): the loss is the same up to the order of sums.

That holds where nothing but our attention reads along the sequence, and nothing is drawn at random for each position.
A try with the loaded model decides, for a family that nobody has listed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from shared.contract.passes import is_packed
from shared.contract.spec import AttemptSpec
from worker.train import row_attention
from worker.train.data import TokenRow

# Fewer tokens, a template's first words, are not worth other sums.
LEAST: Final = 8
_TRIED: Final = 5  # tokens of the beginning, and of each of two rows, in the try
# Of the largest logit: rounding stays below. A row that does not see its beginning is off by a tenth and more.
_ROUNDING: Final[dict[torch.dtype, float]] = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class Beginnings:
    """What the rows of a pass share, if the model of this run lets them."""

    def __init__(self, model: Any, spec: AttemptSpec) -> None:
        self._model = model
        self._asked = spec.device == "cpu" and "shared_beginnings" not in spec.without and _is_plain(spec)
        self._bound: float | None = None  # tokens of the longest row that may share; not known yet

    def shared_tokens(self, rows: Sequence[TokenRow]) -> int:
        """How many tokens at their start all of `rows` share and none is taught; 0: the rows stay whole."""
        count = common_beginning(rows) if self._asked and len(rows) > 1 else 0
        if count < LEAST or max(row.tokens for row in rows) > self._longest():
            return 0
        return count

    def _longest(self) -> float:
        if self._bound is None:
            self._bound = longest_sharing(self._model)
        return self._bound


def _is_plain(spec: AttemptSpec) -> bool:
    """Packed, on one device, without dropout: two rows would draw unlike numbers for one beginning."""
    adapter, placement = spec.job.adapter, spec.job.placement
    return is_packed(spec.job) and placement.strategy == "single" and not adapter.lora_dropout


def common_beginning(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows begin with. Of each row at least one more follows, and the first that follows is not taught:
    it is predicted at the beginning's last place, which would have to predict another token for every row.
    """
    first = rows[0]
    most = min(min(row.tokens, _taught_from(row)) for row in rows) - 1
    same = [_equal(first.ids[:most], row.ids[:most]) for row in rows[1:]]
    return max(0, min(most, *same))


def _taught_from(row: TokenRow) -> int:
    places = np.flatnonzero(row.labelled)
    return int(places[0]) if len(places) else row.tokens


def _equal(left: Any, right: Any) -> int:
    """How many numbers at the start of two arrays of one length are equal."""
    unlike = np.flatnonzero(left != right)
    return int(unlike[0]) if len(unlike) else len(left)


def longest_sharing(model: Any) -> float:
    """Tokens of the longest row that may share its beginning with others, 0 where none may; a try says which."""
    config = model.config.get_text_config()
    dropped = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    if model.config._attn_implementation != row_attention.NAME or dropped or getattr(config, "attention_dropout", 0):
        return 0
    with row_attention.bounds_noted() as bounds:  # windows of layers, by whatever name their config calls them
        return min(bounds, default=0) if agrees(model) else 0


@torch.no_grad()
def agrees(model: Any) -> bool:
    """Whether two rows have the logits behind a shared beginning that they have as whole rows; says so if not."""
    vocabulary = model.config.get_text_config().vocab_size
    beginning, *rests = ((torch.arange(_TRIED) * step + step) % vocabulary for step in (7, 11, 5))
    places = torch.arange(2 * _TRIED)
    shared = torch.cat([beginning, *rests]), torch.cat([places, places[_TRIED:]])
    whole = torch.cat([beginning, rests[0], beginning, rests[1]]), places.repeat(2)
    try:
        ours, theirs = (_logits(model, *read, start) for read, start in ((shared, _TRIED), (whole, 0)))
    except (AssertionError, RuntimeError, ValueError) as error:
        print(f"Rows do not share their beginnings: {error}", flush=True)
        return False
    theirs = torch.cat([theirs[: 2 * _TRIED], theirs[3 * _TRIED :]])
    rounding = _ROUNDING.get(model.dtype, min(_ROUNDING.values()))
    agree = bool((ours - theirs).abs().max() <= rounding * theirs.abs().max())
    if not agree:
        print("Rows do not share their beginnings: the model gives other numbers.", flush=True)
    return agree


def _logits(model: Any, ids: torch.Tensor, places: torch.Tensor, start: int) -> torch.Tensor:
    """Of a pass (length, vocabulary), as training reads it. `start`: where the first row begins."""
    starts = torch.tensor([start, 2 * _TRIED, len(ids)])
    reads = {"position_ids": places[None], row_attention.ROW_STARTS: starts}
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False, **reads).logits
    return logits[0].float()
