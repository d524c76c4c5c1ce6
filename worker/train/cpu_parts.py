"""Has the parts of a model that are bound by memory computed by our kernels on a CPU: norms, rotary, SwiGLU, softmax.

Only what computes just that is changed, and a try says whether a class does. A class gets another forward pass, and no
function on an instance: copies of a model stay whole. What a kernel does not know (a norm that learns, another type, a
batch of several rows) goes upstream's way in that call. Everything is computed in float32 and rounded once; upstream
rounds after each operator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, cast

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


def library() -> ctypes.CDLL:
    loaded = load()
    assert loaded is not None, "a class is changed only where there is a library"
    return loaded


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
        call(library(), "rms", x.dtype, x, weight, y, scale, rows, wide, float(epsilon))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        grad, back = grad.contiguous(), torch.empty_like(x)
        call(library(), "rms_back", x.dtype, grad, x, weight, scale, back, len(scale), x.shape[-1])
        return back, None, None


# ---- SwiGLU


@cache
def _with_swiglu(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        both = _together((self.gate_proj, self.up_proj), x)
        if both is not None and serves(both):
            return cast("torch.Tensor", self.down_proj(_JoinedSwiglu.apply(both)))
        gate, up = (self.gate_proj(x), self.up_proj(x)) if both is None else both.chunk(2, dim=-1)
        inner = _Swiglu.apply(gate, up) if serves(gate, up) else self.act_fn(gate) * up
        return cast("torch.Tensor", self.down_proj(inner))

    return subclass(kind, forward)


def _together(layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
    """What layers answer to `x` by one product, end to end in the last dimension; None: ask each by itself."""
    first, *others = layers
    together = getattr(first, "together", None)  # fused_lora.py
    return None if together is None else cast("torch.Tensor | None", together(others, x))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        call(library(), "swiglu", gate.dtype, gate, up, y, *_lines(gate), gate.shape[-1])
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad, back_gate, back_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        layout = *_lines(gate), gate.shape[-1]
        call(library(), "swiglu_back", gate.dtype, grad, gate, up, back_gate, back_up, *layout)
        return back_gate, back_up


class _JoinedSwiglu(torch.autograd.Function):
    """Gates and what they let through end to end (…, 2 x width), and so their gradients: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        both = both.contiguous()
        gate, up = both.chunk(2, dim=-1)
        y = torch.empty(gate.shape, dtype=both.dtype)
        call(library(), "swiglu", both.dtype, gate, up, y, *_lines(gate), both.shape[-1])
        ctx.save_for_backward(both)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (both,) = ctx.saved_tensors
        back = torch.empty_like(both)
        parts = *both.chunk(2, dim=-1), *back.chunk(2, dim=-1)
        layout = *_lines(parts[0]), both.shape[-1]
        call(library(), "swiglu_back", both.dtype, grad.contiguous(), *parts, *layout)
        return back


def _lines(part: torch.Tensor) -> tuple[int, int]:
    """How many rows, and how wide."""
    wide = part.shape[-1]
    return part.numel() // wide, wide


# ---- rotary, in the forward pass of an attention that calls upstream's function by its name


@cache
def _with_rotary(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """With the projections done by one product as well, where the layers offer it."""
    alone: Any = with_rotary(kind, _turned)
    if kind.forward.__code__.co_varnames[1:2] != ("hidden_states",):
        return cast("type[torch.nn.Module]", alone)

    def forward(self: Any, hidden_states: torch.Tensor, *more: Any, **named: Any) -> Any:
        asked = _projected(self, hidden_states)
        return alone.forward(self if asked is None else asked, hidden_states, *more, **named)

    return subclass(kind, forward)


def _turned(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> Any:
    if not serves(query, key, cosine, sine) or not of_one_sequence(query, key, cosine):
        return None
    return _Rotary.apply(query, key, cosine.contiguous(), sine.contiguous())


_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")


class _Answered:
    """An attention whose queries, keys and values are there already; all else is the attention's own."""

    def __init__(self, attention: Any, hidden_states: torch.Tensor, answers: Sequence[torch.Tensor]) -> None:
        self._attention = attention
        for name, answer in zip(_PROJECTIONS, answers, strict=True):
            setattr(self, name, partial(_answer, hidden_states, answer, getattr(attention, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def _answer(asked: torch.Tensor, answer: torch.Tensor, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return answer if x is asked else cast("torch.Tensor", layer(x))


def _projected(attention: Any, hidden_states: torch.Tensor) -> _Answered | None:
    """The attention with its projections done by one product; None where each is asked by itself."""
    layers = [getattr(attention, name, None) for name in _PROJECTIONS]
    answers = _together(layers, hidden_states)
    if answers is None:
        return None
    sizes = [layer.out_features for layer in layers if layer is not None]
    return _Answered(attention, hidden_states, answers.split(sizes, dim=-1))


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
    call(library(), "rotary", part.dtype, part, cosine, sine, turned, places, heads, size, *strides, turn)
    return turned.transpose(0, 1)[None]


# ---- the loss


class Nll(torch.autograd.Function):
    """Cross-entropy of each row in float32, and whether its target is the most likely."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, rows = logits.contiguous(), len(targets)
        losses, right = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.bool)
        grads = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sizes = rows, logits.shape[-1]
        call(library(), "nll", logits.dtype, logits, targets.contiguous(), losses, right, grads, *sizes)
        if grads is not None:
            ctx.save_for_backward(grads)
        correct = right.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _correct: torch.Tensor) -> Any:
        (grads,) = ctx.saved_tensors
        return grads * grad, None
