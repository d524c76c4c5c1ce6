"""Triton's kernels for SwiGLU and rotary embeddings, each one pass over memory, each way.

Everything is computed in float32 and rounded once. Imported where they run: PyTorch's CPU wheels come without Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _swiglu(gate, up, out, n, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_back(grad, gate, up, back_gate, back_up, n, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0917
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(back_up + at, (d * g * s).to(back_up.dtype.element_ty), mask=inside)
    tl.store(back_gate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(back_gate.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(part, cosine, sine, out, heads, by_place, by_head, turn, half, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0917
    """One program turns one head of one place: halves are pairs, as in Llama's `rotate_half`."""
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < half
    start = part + place * by_place + head * by_head
    first = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half + at, mask=inside, other=0.0).to(tl.float32)
    angle = place * 2 * half + at
    c1 = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cosine + angle + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sine + angle + half, mask=inside, other=0.0).to(tl.float32)
    if turn > 0:
        left, right = first * c1 - second * s1, second * c2 + first * s2
    else:
        left, right = first * c1 + second * s2, second * c2 - first * s1
    to = out + (place * heads + head) * 2 * half
    tl.store(to + at, left.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half + at, right.to(out.dtype.element_ty), mask=inside)


class Swiglu(torch.autograd.Function):
    """silu(gate) * up, of any one shape and type; nothing but its inputs is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _swiglu[_blocks(gate)](gate, up, out, gate.numel(), block=BLOCK)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad, back_gate, back_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _swiglu_back[_blocks(gate)](grad, gate, up, back_gate, back_up, gate.numel(), block=BLOCK)
        return back_gate, back_up


class Rotary(torch.autograd.Function):
    """Queries and keys (1, heads, places, size) turned by cosine and sine (1, places, size)."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cosine, sine)
        return _turn(query, cosine, sine, 1), _turn(key, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        query, key = (_turn(grad, cosine, sine, -1) for grad in grads)
        return query, key, None, None


def _turn(part: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, turn: int) -> torch.Tensor:
    part = part if part.stride(3) == 1 else part.contiguous()
    _, heads, places, size = part.shape
    out = torch.empty(places, heads, size, dtype=part.dtype, device=part.device)
    strides = part.stride(2), part.stride(1)
    block = triton.next_power_of_2(size // 2)
    _rotary[places, heads](part, cosine, sine, out, heads, *strides, turn, size // 2, block=block)
    return out.transpose(0, 1)[None]


def _blocks(numbers: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(numbers.numel(), BLOCK),)
