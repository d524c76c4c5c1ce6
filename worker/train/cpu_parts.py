"""Has the parts of a model that are bound by memory computed by our kernels on a CPU: norms, rotary, SwiGLU, softmax.

Only what computes just that is changed, and a try says whether a class does. A class gets another forward pass, and no
function on an instance: copies of a model stay whole. What a kernel does not know (a norm that learns, another type, a
batch of several rows) goes upstream's way in that call. Everything is computed in float32 and rounded once; upstream
rounds after each operator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from shared.contract.spec import AttemptSpec
from worker.train.cpu_kernels import SUFFIX, call, load
from worker.train.fused_norms import epsilon_of, is_candidate, is_plain
from worker.train.plain_parts import (
    BY_KERNELS,
    is_gated,
    is_swiglu,
    of_one_sequence,
    subclass,
    turns_plainly,
    with_rotary,
    with_swiglu,
)


def kernels_serve(spec: AttemptSpec) -> bool:
    """Whether an attempt may use them. Layers that are spread over ranks are called through hooks, which stay."""
    spread = spec.job.placement.strategy == "fsdp"
    return spec.device == "cpu" and not spread and "cpu_kernels" not in spec.without


def use_kernels(model: torch.nn.Module, *, out: Path | None = None) -> int:
    """Change every part of `model` that our kernels compute; returns how many: none where there is no library.

    `out`: where what was compiled is looked for and left.
    """
    if load(out) is None:
        return 0
    changed = 0
    for module in model.modules():
        kind: Any = type(module)
        if not hasattr(kind, BY_KERNELS) and (ours := _changed(module, kind)) is not None:
            module.__class__ = ours
            changed += 1
    return changed


def _changed(module: torch.nn.Module, kind: Any) -> type[torch.nn.Module] | None:
    if is_candidate(module) and is_plain(kind):
        return _with_norm(kind)
    if is_gated(module) and is_swiglu(kind):
        return _with_swiglu(kind)
    return _with_rotary(kind) if turns_plainly(kind) else None


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None, "a class is changed only where there is a library"
    return library


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels read all of them: on the CPU, of one type that they know."""
    first = tensors[0].dtype
    return first in SUFFIX and all(each.device.type == "cpu" and each.dtype == first for each in tensors)


# ---- norms


@cache
def _with_norm(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or not serves(hidden_states, self.weight):
            return cast("torch.Tensor", kind.forward(self, hidden_states))
        return cast("torch.Tensor", _Norm.apply(hidden_states, self.weight, epsilon_of(self)))

    return subclass(kind, forward)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        wide = x.shape[-1]
        rows = x.numel() // wide
        y, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
        call(_library(), "rms", x.dtype, x, weight, y, scale, rows, wide, float(epsilon))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        grad, back = grad.contiguous(), torch.empty_like(x)
        call(_library(), "rms_back", x.dtype, grad, x, weight, scale, back, len(scale), x.shape[-1])
        return back, None, None


# ---- SwiGLU


@cache
def _with_swiglu(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return with_swiglu(kind, lambda gate, up: _Swiglu.apply(gate, up) if serves(gate, up) else None)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        call(_library(), "swiglu", gate.dtype, gate, up, y, gate.numel())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad, back_gate, back_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        call(_library(), "swiglu_back", gate.dtype, grad, gate, up, back_gate, back_up, gate.numel())
        return back_gate, back_up


# ---- rotary, in the forward pass of an attention that calls upstream's function by its name


@cache
def _with_rotary(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return with_rotary(kind, _turned)


def _turned(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> Any:
    if not serves(query, key, cosine, sine) or not of_one_sequence(query, key, cosine):
        return None
    return _Rotary.apply(query, key, cosine.contiguous(), sine.contiguous())


class _Rotary(torch.autograd.Function):
    """Queries and keys (1, heads, places, size), laid out with places first as the projections give them."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> Any:
        ctx.save_for_backward(cosine, sine)
        return _turn(query, cosine, sine, 1.0), _turn(key, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        query, key = (_turn(grad, cosine, sine, -1.0) for grad in grads)
        return query, key, None, None


def _turn(part: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, turn: float) -> torch.Tensor:
    part = part if part.stride(3) == 1 else part.contiguous()
    _, heads, places, size = part.shape
    turned = torch.empty(places, heads, size, dtype=part.dtype)
    strides = part.stride(2), part.stride(1)
    call(_library(), "rotary", part.dtype, part, cosine, sine, turned, places, heads, size, *strides, turn)
    return turned.transpose(0, 1)[None]


# ---- attention of packed rows (row_attention.py)


class CausalRows(torch.autograd.Function):
    """Each row of (1, heads, length, size) attends to itself: returns (1, length, heads, size).

    Query heads of one key head are one matrix: nothing is repeated, and their gradients are summed by the product.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes by position
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scaling: float
    ) -> torch.Tensor:
        _, heads, places, size = query.shape
        groups = key.shape[1]
        seen = torch.empty(places, heads, size, dtype=query.dtype)
        kept = list[torch.Tensor]()
        rows = zip(*(part[0].split(lengths, dim=1) for part in (query, key, value)), seen.split(lengths), strict=True)
        for length, (of_query, of_key, of_value, out) in zip(lengths, rows, strict=True):
            q, k, v = of_query.reshape(groups, -1, size), of_key.contiguous(), of_value.contiguous()
            weights = torch.bmm(q, k.transpose(1, 2))
            call(_library(), "weigh", weights.dtype, weights, heads, length, scaling)
            out.copy_(torch.bmm(weights, v).view(heads, length, size).transpose(0, 1))
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.lengths, ctx.scaling, ctx.heads = lengths, scaling, heads
        return seen[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, heads, lengths = ctx.saved_tensors, ctx.heads, ctx.lengths
        groups, _, size = kept[1].shape
        backs = [torch.empty(sum(lengths), count, size, dtype=grad.dtype) for count in (heads, groups, groups)]
        rows = zip(grad[0].split(lengths), *(back.split(lengths) for back in backs), strict=True)
        for row, (given, *places) in enumerate(rows):
            q, k, v, weights = kept[4 * row : 4 * row + 4]
            g = given.transpose(0, 1).reshape(groups, -1, size)
            scores = torch.bmm(g, v.transpose(1, 2))
            call(_library(), "weigh_back", scores.dtype, scores, weights, heads, lengths[row], ctx.scaling)
            products = ((scores, k), (scores.transpose(1, 2), q), (weights.transpose(1, 2), g))
            for place, (left, right) in zip(places, products, strict=True):
                place.copy_(torch.bmm(left, right).view(-1, lengths[row], size).transpose(0, 1))
        return *(back.transpose(0, 1)[None] for back in backs), None, None


# ---- the loss


class Nll(torch.autograd.Function):
    """Cross-entropy of each row in float32, and whether its target is the most likely."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, rows = logits.contiguous(), len(targets)
        losses, right = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.bool)
        grads = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sizes = rows, logits.shape[-1]
        call(_library(), "nll", logits.dtype, logits, targets.contiguous(), losses, right, grads, *sizes)
        if grads is not None:
            ctx.save_for_backward(grads)
        correct = right.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _correct: torch.Tensor) -> Any:
        (grads,) = ctx.saved_tensors
        return grads * grad, None
