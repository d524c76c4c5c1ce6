"""Attention of packed rows by our kernels on a CPU: each row to itself, and to the beginning that all of a pass share.

Short rows are computed where they lie, in one call for the whole pass (`cpu_attention.c`); longer ones by torch's
products, whose matrices are large enough then, row by row.

Parts of a pass: `starts` are the places where rows begin, and where the last one ends. What lies before the first is
the beginning that all rows share; 0: nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import torch

from worker.train.cpu_kernels import call
from worker.train.cpu_parts import library

# Keys of a row. Its squares of float32 stay in a core's second cache; where the products begin to win is not measured.
SHORT: Final = 256


def segments(starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First place and length of the shared beginning, if there is one, and of each row."""
    if starts[0]:
        yield 0, starts[0]
    for first, end in pairwise(starts):
        yield first, end - first


def longest_row(starts: Sequence[int]) -> int:
    """Keys of the row that sees most."""
    return starts[0] + max(end - first for first, end in pairwise(starts))


def causal_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scaling: float
) -> torch.Tensor:
    """(1, heads, length, size) each, of one type that the kernels read; returns (1, length, heads, size)."""
    road: Any = ShortRows if longest_row(starts) <= SHORT else LongRows
    seen: torch.Tensor = road.apply(query, key, value, starts, scaling)
    return seen


class ShortRows(torch.autograd.Function):
    """All rows in one call. Kept for the backward pass: what comes in, and a number for each head and place."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes by position
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scaling: float
    ) -> torch.Tensor:
        parts = [part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value)]
        _, heads, places, size = query.shape
        seen, logs = torch.empty(places, heads, size, dtype=query.dtype), torch.empty(heads, places)
        layout, scratch = _layout(parts, starts, scaling)
        call(library(), "attend", query.dtype, *parts, seen, logs, scratch, *layout)
        ctx.save_for_backward(*parts, logs)
        ctx.starts, ctx.scaling = starts, scaling
        return seen[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        *parts, logs = ctx.saved_tensors
        groups, size = parts[1].shape[1], parts[1].shape[3]
        layout, scratch = _layout(parts, ctx.starts, ctx.scaling)
        backs = [torch.empty(part.shape[2], part.shape[1], size, dtype=part.dtype) for part in parts]
        shared = torch.empty(len(ctx.starts), groups, 2, ctx.starts[0], size, dtype=torch.float32)
        call(library(), "attend_back", grad.dtype, grad.contiguous(), *parts, logs, *backs, scratch, shared, *layout)
        return *(back.transpose(0, 1)[None] for back in backs), None, None


def _layout(parts: Sequence[torch.Tensor], starts: Sequence[int], scaling: float) -> tuple[list[Any], torch.Tensor]:
    """The arguments that tell the kernels where everything lies, and what its threads write their notes to."""
    (_, heads, _, size), groups = parts[0].shape, parts[1].shape[1]
    longest = longest_row(starts)
    strides = [stride for part in parts for stride in (part.stride(2), part.stride(1))]
    scratch = torch.empty(library().threads() * library().attention_scratch(longest, size), dtype=torch.float32)
    return [torch.tensor(starts), len(starts) - 1, heads, groups, size, *strides, longest, scaling], scratch


class LongRows(torch.autograd.Function):
    """Row by row. Query heads of one key head are one matrix: nothing is repeated, and the product sums gradients."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes by position
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scaling: float
    ) -> torch.Tensor:
        _, heads, places, size = query.shape
        groups = key.shape[1]
        seen = torch.empty(places, heads, size, dtype=query.dtype)
        kept = list[torch.Tensor]()
        for first, length in segments(starts):
            before = starts[0] if first else 0
            q = query[0, :, first : first + length].reshape(groups, -1, size)
            k, v = (_with_beginning(part[0], first, length, before) for part in (key, value))
            weights = torch.bmm(q, k.transpose(1, 2))
            call(library(), "weigh", weights.dtype, weights, heads, length, before, scaling)
            of_row = torch.bmm(weights, v).view(heads, length, size)
            seen[first : first + length].copy_(of_row.transpose(0, 1))
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.starts, ctx.scaling, ctx.heads = starts, scaling, heads
        return seen[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, heads, starts = ctx.saved_tensors, ctx.heads, ctx.starts
        groups, _, size = kept[1].shape
        backs = [torch.empty(starts[-1], count, size, dtype=grad.dtype) for count in (heads, groups, groups)]
        # What every row gives to the beginning is summed before it is rounded.
        shared = torch.zeros(2, groups, starts[0], size, dtype=torch.float32)
        for number, (first, length) in enumerate(segments(starts)):
            q, k, v, weights = kept[4 * number : 4 * number + 4]
            before, place = k.shape[1] - length, slice(first, first + length)
            g = grad[0, place].transpose(0, 1).reshape(groups, -1, size)
            scores = torch.bmm(g, v.transpose(1, 2))
            call(library(), "weigh_back", scores.dtype, scores, weights, heads, length, before, ctx.scaling)
            backs[0][place].copy_(torch.bmm(scores, k).view(-1, length, size).transpose(0, 1))
            for which, (left, right) in enumerate(((scores, q), (weights, g))):
                to_keys = torch.bmm(left.transpose(1, 2), right)
                backs[1 + which][place].copy_(to_keys[:, before:].transpose(0, 1))
                if starts[0]:
                    shared[which] += to_keys[:, : starts[0]]
        for back, sums in zip(backs[1:], shared, strict=True):
            back[: starts[0]].copy_(sums.transpose(0, 1))
        return *(back.transpose(0, 1)[None] for back in backs), None, None


def _with_beginning(part: torch.Tensor, first: int, length: int, before: int) -> torch.Tensor:
    """Keys or values (heads, length, size) of a row, behind those of the beginning."""
    own = part[:, first : first + length]
    return torch.cat((part[:, :before], own), dim=1) if before else own.contiguous()
