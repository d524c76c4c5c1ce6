"""Has SwiGLU and rotary embeddings of a model computed by Triton's kernels on a GPU, each in one pass over memory.

Upstream's operators make three passes for one and ten for the other, and round after each. Only a class that computes
just that is changed, and only on a device where a try of the kernels gives upstream's numbers. What a kernel does not
know (another type, a batch of several rows) goes upstream's way in that call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, Final

import torch
from torch.nn.functional import silu

from shared.contract.spec import AttemptSpec
from worker.train.plain_parts import (
    BY_KERNELS,
    is_gated,
    is_swiglu,
    of_one_sequence,
    sixteen_bits,
    turns_plainly,
    with_rotary,
    with_swiglu,
)

_TYPES: Final = frozenset({torch.bfloat16, torch.float16, torch.float32})
_TOLERANCE: Final = 0.05  # of numbers around 1, in 16 bits
Change = Callable[[Any, ModuleType], type[torch.nn.Module] | None]


def fuse_parts(model: torch.nn.Module, spec: AttemptSpec) -> int:
    """Change every part of `model` that the kernels compute; returns how many. None where they fail their try.

    Layers that are spread over ranks are called through hooks, and stay as they are.
    """
    if spec.device != "cuda" or spec.job.placement.strategy == "fsdp":
        return 0
    changes: dict[str, Change] = {"fused_swiglu": _swiglu_of, "fused_rotary": _rotary_of}
    wanted = [change for road, change in changes.items() if road not in spec.without]
    kernels = _kernels_of(next(model.parameters()).device) if wanted else None
    return 0 if kernels is None else sum(_change(module, wanted, kernels) for module in model.modules())


def _change(module: Any, wanted: list[Change], kernels: ModuleType) -> bool:
    if hasattr(type(module), BY_KERNELS):
        return False
    ours = next((made for change in wanted if (made := change(module, kernels)) is not None), None)
    if ours is not None:
        module.__class__ = ours
    return ours is not None


@cache
def _kernels_of(device: torch.device) -> ModuleType | None:
    """The kernels, where they compute on `device` what they should; tried once."""
    try:
        from worker.train import gpu_kernels

        agrees = _agrees(gpu_kernels, device)
    except Exception as error:  # noqa: BLE001 -- a compiler and a driver have many ways to fail
        print(f"Triton's kernels for SwiGLU and rotary embeddings are not used: {error}", flush=True)
        return None
    if not agrees:
        print("Triton's kernels for SwiGLU and rotary embeddings are not used: they give other numbers", flush=True)
    return gpu_kernels if agrees else None


def _agrees(kernels: ModuleType, device: torch.device) -> bool:
    numbers = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 5, 48, generator=numbers)
    query, key = torch.randn(1, 4, 5, 16, generator=numbers), torch.randn(1, 2, 5, 16, generator=numbers)
    cosine, sine = torch.randn(2, 1, 5, 16, generator=numbers)
    there = partial(torch.Tensor.to, device=device, dtype=sixteen_bits(device))
    answers = (
        kernels.Swiglu.apply(there(gate), there(up)),
        *kernels.Rotary.apply(*(there(part) for part in (query, key, cosine, sine))),
    )
    expected = (silu(gate) * up, _turned(query, cosine, sine), _turned(key, cosine, sine))
    return all(
        torch.allclose(answer.float().cpu(), wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
        for answer, wanted in zip(answers, expected, strict=True)
    )


def _turned(part: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = part.chunk(2, dim=-1)
    return part * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]


def _serves(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return first.dtype in _TYPES and all((each.dtype, each.device) == (first.dtype, first.device) for each in tensors)


def _swiglu_of(module: Any, kernels: ModuleType) -> type[torch.nn.Module] | None:
    kind: Any = type(module)  # what a cache takes as its key, to mypy
    return _with_swiglu(kind, kernels) if is_gated(module) and is_swiglu(kind) else None


def _rotary_of(module: Any, kernels: ModuleType) -> type[torch.nn.Module] | None:
    kind: Any = type(module)
    return _with_rotary(kind, kernels) if turns_plainly(kind) else None


@cache
def _with_swiglu(kind: type[torch.nn.Module], kernels: ModuleType) -> type[torch.nn.Module]:
    def inner(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
        return kernels.Swiglu.apply(gate, up) if _serves(gate, up) else None

    return with_swiglu(kind, inner)


@cache
def _with_rotary(kind: type[torch.nn.Module], kernels: ModuleType) -> type[torch.nn.Module]:
    def turned(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> Any:
        if not _serves(query, key, cosine, sine) or not of_one_sequence(query, key, cosine):
            return None
        return kernels.Rotary.apply(query, key, cosine.contiguous(), sine.contiguous())

    return with_rotary(kind, turned)
