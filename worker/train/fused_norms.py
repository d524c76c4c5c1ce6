"""RMS norms by torch's own kernel, one each way, where upstream's classes take seven in the forward pass alone.

Only classes that compute x / rms(x) * weight are changed, and a try says whether a class does: Gemma's multiplies with
1 + weight, Mamba's with a gate, and both stay as they are. Everything is summed and scaled in float32 and rounded
once; upstream rounds before it scales. On CPUs upstream's stays: torch has no kernel of one pass for them.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Final, cast

import torch
from torch.nn.functional import rms_norm

from worker.train.plain_parts import sixteen_bits

_EPSILON: Final = ("variance_epsilon", "eps")  # upstream's names for what keeps the root from zero


def fuse_norms(model: torch.nn.Module) -> int:
    """Have every plain RMS norm of `model` computed by the kernel; returns how many there are."""
    norms: list[Any] = [module for module in model.modules() if is_candidate(module) and is_plain(_class_of(module))]
    agrees = {device: _kernel_agrees(device) for device in {norm.weight.device for norm in norms}}
    chosen = [norm for norm in norms if agrees[norm.weight.device]]
    for norm in chosen:
        norm.__class__ = _by_kernel(_class_of(norm))
    return len(chosen)


def _class_of(module: torch.nn.Module) -> Any:  # what a cache takes as its key, to mypy
    return type(module)


@cache
def _kernel_agrees(device: torch.device) -> bool:
    """Whether the kernel of this device computes what its definition says, in 16 bits; tried once."""
    numbers = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(4, 64, generator=numbers), torch.rand(64, generator=numbers) + 0.5
    expected = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * weight
    try:
        dtype = sixteen_bits(device)
        answer = rms_norm(rows.to(device, dtype), (64,), weight.to(device, dtype), 1e-5)
    except RuntimeError as error:
        print(f"torch's kernel for RMS norms is not used: {error}", flush=True)
        return False
    agrees = torch.allclose(answer.float().cpu(), expected, rtol=0.05, atol=0.05)
    if not agrees:
        print("torch's kernel for RMS norms is not used: it gives other numbers", flush=True)
    return agrees


def is_candidate(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    one_input = len(inspect.signature(type(module).forward).parameters) == 2  # a gate would be one more
    return (
        "RMSNorm" in type(module).__name__
        and isinstance(weight, torch.nn.Parameter)
        and weight.dim() == 1
        and one_input
        and epsilon_of(module) is not None
        and [name for name, _ in module.named_parameters(recurse=False)] == ["weight"]
    )


def epsilon_of(module: torch.nn.Module) -> float | None:
    named = [getattr(module, name) for name in _EPSILON if isinstance(getattr(module, name, None), float)]
    return named[0] if named else None


@cache
def is_plain(kind: type[torch.nn.Module]) -> bool:
    """Whether such a norm multiplies with its weight and does nothing more: asked of one with weights of no meaning."""
    try:
        norm: Any = kind(16, eps=1e-5)
    except TypeError:
        return False
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(16, generator=numbers) + 0.5)
        rows = torch.randn(4, 16, generator=numbers)
        return torch.allclose(norm(rows), rms_norm(rows, (16,), norm.weight, 1e-5), rtol=1e-5, atol=1e-6)


@cache
def _by_kernel(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class with another forward pass. A class, and no function on an instance: copies of a model stay whole."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:  # a norm that trains whole, in float32
            return kind.forward(self, hidden_states)
        # Autocast would raise what comes in to float32, and hand float32 on.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, epsilon_of(self))

    return cast("type[torch.nn.Module]", type(f"Fused{kind.__name__}", (kind,), {"forward": forward}))
