"""Parts of a model that compute just what a kernel computes, and how such a class gets another forward pass.

SwiGLU and rotary embeddings are computed by kernels on CPUs (cpu_parts.py) and on GPUs (gpu_parts.py). A try says
whether a class does just that. No function on an instance and none of upstream's modules is changed: a class gets a
subclass, so that copies of a model stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Final, cast

import torch
from torch.nn.functional import linear, silu

BY_KERNELS: Final = "computed_by_kernels"  # on a class that we have changed
_ROTARY: Final = "apply_rotary_pos_emb"  # upstream's name in each family's file

# From gate and up; None: upstream's way in this call.
Inner = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
# From query, key, cosine and sine: query and key turned; None as above.
Turned = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


def sixteen_bits(device: torch.device) -> torch.dtype:
    """The type of 16 bits that a device multiplies. GPUs before compute capability 8.0 at most emulate bfloat16."""
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def is_gated(module: torch.nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and _is_silu(
        module.act_fn
    )


def _is_silu(function: Any) -> bool:
    numbers = torch.linspace(-3, 3, 7)
    return callable(function) and torch.allclose(function(numbers), silu(numbers))


@cache
def is_swiglu(kind: Any) -> bool:
    """Whether such a part is down(silu(gate(x)) * up(x)) and nothing more: asked of one with small random weights."""
    numbers = torch.Generator().manual_seed(0)
    probe: Any = torch.nn.Module()
    weights = {name: torch.randn(6, 6, generator=numbers) for name in ("gate_proj", "up_proj", "down_proj")}
    for name, weight in weights.items():
        setattr(probe, name, _Linear(weight))
    probe.act_fn, probe.training = silu, False
    rows = torch.randn(3, 6, generator=numbers)
    try:
        answer = kind.forward(probe, rows)
    except (AttributeError, TypeError, RuntimeError):
        return False
    inner = silu(linear(rows, weights["gate_proj"])) * linear(rows, weights["up_proj"])
    expected = linear(inner, weights["down_proj"])
    return isinstance(answer, torch.Tensor) and torch.allclose(answer, expected, rtol=1e-5, atol=1e-6)


class _Linear(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.weight)


def with_swiglu(kind: type[torch.nn.Module], inner: Inner) -> type[torch.nn.Module]:
    """`kind`, with silu(gate) * up computed by `inner`."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        made = inner(gate, up)
        return cast("torch.Tensor", self.down_proj(self.act_fn(gate) * up if made is None else made))

    return subclass(kind, forward)


# ---- rotary, in the forward pass of an attention that calls upstream's function by its name


@cache
def turns_plainly(kind: Any) -> bool:
    """Whether this class's forward pass calls a rotary function that turns halves, as Llama's does."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names or forward.__closure__:
        return False
    upstreams = forward.__globals__.get(_ROTARY)
    numbers = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 3, 8, generator=numbers), torch.randn(1, 2, 3, 8, generator=numbers)
    cosine, sine = torch.randn(2, 1, 3, 8, generator=numbers)
    try:
        answers = cast("Callable[..., Any]", upstreams)(query, key, cosine, sine)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    expected = [part * cosine[:, None] + _halves_swapped(part) * sine[:, None] for part in (query, key)]
    pairs = zip(answers, expected, strict=False)
    return isinstance(answers, tuple) and all(
        isinstance(answer, torch.Tensor) and answer.shape == wanted.shape and torch.allclose(answer, wanted, atol=1e-6)
        for answer, wanted in pairs
    )


def _halves_swapped(part: torch.Tensor) -> torch.Tensor:
    first, second = part.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def with_rotary(kind: type[torch.nn.Module], turned: Turned) -> type[torch.nn.Module]:
    """`kind`, with queries and keys turned by `turned`."""
    forward = cast("FunctionType", kind.forward)
    upstreams = forward.__globals__[_ROTARY]

    def ours(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *more: Any) -> Any:
        made = None if more else turned(query, key, cosine, sine)
        return upstreams(query, key, cosine, sine, *more) if made is None else made

    own = FunctionType(forward.__code__, {**forward.__globals__, _ROTARY: ours}, forward.__name__, forward.__defaults__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return subclass(kind, own)


def of_one_sequence(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor) -> bool:
    """Whether it is one sequence (packed, or a row alone) whose heads lie one number beside the other."""
    plain = cosine.shape == (1, *query.shape[2:3], key.shape[3])
    return plain and len(query) == 1 and query.stride(3) == 1 and key.stride(3) == 1


def subclass(kind: type[torch.nn.Module], forward: Any) -> type[torch.nn.Module]:
    made = type(f"Compiled{kind.__name__}", (kind,), {"forward": forward, BY_KERNELS: True})
    return cast("type[torch.nn.Module]", made)
