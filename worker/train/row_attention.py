"""Attention of packed rows, row by row: what a row does not see is not computed.

On CUDA all rows of a pass go to torch's flash kernel for rows of unlike length, or each to
`scaled_dot_product_attention` without a mask. With one, torch never takes its flash kernel, makes the mask a bias of 16
bits in every layer, and does work that grows with the square of the pass, not of its rows.

torch's CPU kernel for it works through the whole masked square, and its backward pass is no faster on small pieces.
Measured on 2 cores, one layer of 9 heads, 487 tokens in five rows, forward and backward: 7.9 ms masked, 8.4 ms that
kernel row by row, 4.1 ms batched products row by row. Where our kernels are (`cpu_parts`), they make scores weights.

Registered with transformers under `NAME` (its `AttentionInterface`); every call that is not plain causal attention of
packed rows goes to transformers' own `sdpa`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Final

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from worker.train.cpu_attention import causal_rows, longest_row, segments
from worker.train.cpu_parts import serves
from worker.train.plain_parts import BY_KERNELS

NAME: Final = "row_wise_sdpa"
# transformers' names for where packed rows start, and where the last one ends: here on the host, so that nobody waits
# for the device to know their lengths; and on the device, which asks for the kernel that reads them there. What lies
# before the first start is the beginning that all rows share (shared_beginning.py).
ROW_STARTS: Final = "cu_seq_lens_q"
STARTS_ON_DEVICE: Final = "cu_seq_lens_k"
# On a CPU, beyond it the square of scores is larger than what the fused kernel saves by never writing it.
LONGEST: Final = 1024
# Arguments that make attention more than causal; None for the plain kind.
_MORE: Final = ("softcap", "position_bias", "s_aux", "cache")
_WINDOW: Final = "sliding_window"
_WIDEST_HEAD: Final = 256  # of the flash kernel
_NOT_USED: Final = "torch's flash kernel for rows of unlike length is not used"


def attend(  # noqa: PLR0917 -- transformers passes by position
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (batch, heads, length, size) each; returns (batch, length, heads, size)."""
    given = kwargs.get(ROW_STARTS)
    plain = len(query) == 1 and not dropout and all(kwargs.get(name) is None for name in _MORE)
    starts: list[int] = [0, 0] if given is None else given.tolist()
    bound = longest(getattr(module, "config", None), query.device, kwargs)
    for bounds in _LISTENING:
        bounds.append(bound)
    if not plain or starts[-1] != query.shape[2] or longest_row(starts) > bound:
        # A mask made from positions would hide the shared beginning from all rows but the first.
        assert not starts[0], "rows share their beginning only where they attend apart"
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    on_device = kwargs.get(STARTS_ON_DEVICE)
    if on_device is not None and varlen_serves(query, key, value):
        return by_varlen((query, key, value), on_device, longest_row(starts), scaling), None
    by_row: Callable[..., torch.Tensor] = BY_ROW.get(query.device.type, by_kernel)
    return by_row(module, (query, key, value), starts, scaling), None


def longest(config: Any, device: torch.device, given: dict[str, Any]) -> float:
    """The longest row that may attend apart: within a window or a chunk of this layer every position sees all earlier.

    A family that tells the layer's window says None where it has none. Of another the config may have one that only the
    mask knows.
    """
    window = given[_WINDOW] if _WINDOW in given else getattr(config, _WINDOW, None)
    bounds = (window, getattr(config, "attention_chunk_size", None), LONGEST if device.type == "cpu" else None)
    return min((bound for bound in bounds if bound), default=math.inf)


@contextmanager
def bounds_noted() -> Iterator[list[float]]:
    """The longest row that may attend apart, of every layer that is asked meanwhile."""
    bounds = list[float]()
    _LISTENING.append(bounds)
    try:
        yield bounds
    finally:
        _LISTENING.pop()


_LISTENING: Final[list[list[float]]] = []
_Parts = Sequence[torch.Tensor]  # queries, keys, values


def varlen_serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the flash kernel is there for them: NVIDIA's cards from Ampere on, in 16 bits, and a try agrees.

    It has one size of a head and one type for all three; latent attention (DeepSeek) has smaller values than keys.
    """
    size = query.shape[-1]
    if query.device.type != "cuda" or torch.version.hip is not None or size > _WIDEST_HEAD or size % 8:
        return False
    if any((part.shape[-1], part.dtype) != (size, query.dtype) for part in (key, value)):
        return False
    half = query.dtype in (torch.bfloat16, torch.float16)
    modern = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return half and modern and kernel_agrees(query.device, query.dtype, (query.shape[1], key.shape[1], size))


@cache
def kernel_agrees(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether the kernel gives two rows what they have one by one, and the same gradients: tried once, on this device.

    `shape`: query heads, key heads, size of a head.
    """
    heads, key_heads, size = shape
    lengths = (5, 3)
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    numbers = torch.Generator().manual_seed(0)  # a try must not move the run's own random numbers
    sizes = [(1, count, sum(lengths), size) for count in (heads, key_heads, key_heads)]
    parts = [torch.randn(each, generator=numbers).to(device, dtype).requires_grad_() for each in sizes]
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    try:
        # Within a layer that is recomputed later, what autograd keeps here is none of its affair.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            answers = (by_varlen(parts, starts, max(lengths), None), by_kernel(module, parts, starts.tolist(), None))
            ours, theirs = ((seen, *torch.autograd.grad(seen.float().square().sum(), parts)) for seen in answers)
    except (RuntimeError, ValueError, TypeError) as error:  # TypeError: another version of torch has other parameters
        print(f"{_NOT_USED}: {error}", flush=True)
        return False
    pairs = zip(ours, theirs, strict=True)
    agree = all(torch.allclose(left.float(), right.float(), rtol=0.05, atol=0.05) for left, right in pairs)
    if not agree:
        print(f"{_NOT_USED}: it gives other numbers", flush=True)
    return agree


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def by_varlen(parts: _Parts, starts: torch.Tensor, longest: int, scaling: float | None) -> torch.Tensor:
    """All rows in one call: (batch, length, heads, size). `starts`: int32, where the parts are."""
    query, key, value = (part[0].transpose(0, 1) for part in parts)
    grouped, causal = query.shape[1] != key.shape[1], (-1, 0)
    seen = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=causal, enable_gqa=grouped
    )
    assert isinstance(seen, torch.Tensor), "no further figures were asked for"
    return seen[None]


def by_kernel(module: torch.nn.Module, parts: _Parts, starts: Sequence[int], scaling: float | None) -> torch.Tensor:
    """Each row through torch's fused kernel, causal and without a mask: (batch, length, heads, size)."""
    assert not starts[0], "this kernel does not know of shared beginnings"
    lengths = [length for _, length in segments(starts)]
    rows = zip(*(part.split(lengths, dim=2) for part in parts), strict=True)
    seen = [sdpa_attention_forward(module, q, k, v, None, scaling=scaling, is_causal=True)[0] for q, k, v in rows]
    return torch.cat(seen, dim=1)


def by_products(module: torch.nn.Module, parts: _Parts, starts: Sequence[int], scaling: float | None) -> torch.Tensor:
    """Each row by batched products: (batch, length, heads, size)."""
    query, key, value = parts
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if hasattr(module, BY_KERNELS) and _kernels_serve(query, key, value):
        return causal_rows(query, key, value, starts, float(scale))
    lengths = [length for _, length in segments(starts)]
    rows = list(zip(*(part[0].split(lengths, dim=1) for part in parts), strict=True))
    beginnings = [None, *[rows[0][1:] if starts[0] else None] * len(rows)]  # the first part sees none before itself
    seen = [
        _causal(q, k, v, beginning, groups=groups, scale=scale)
        for (q, k, v), beginning in zip(rows, beginnings, strict=False)
    ]
    return torch.cat(seen, dim=1).transpose(0, 1)[None].contiguous()


BY_ROW: Final[dict[str, Callable[..., torch.Tensor]]] = {"cpu": by_products}  # by the kind of device; else the kernel


def _kernels_serve(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Autocast would round float32 on the way forth, and not on the way back."""
    rounds = query.dtype != torch.bfloat16 and torch.is_autocast_enabled("cpu")
    return serves(query, key, value) and not rounds and query.shape[3] == key.shape[3] == value.shape[3]


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beginning: _Parts | None, *, groups: int, scale: float
) -> torch.Tensor:
    """One row: (heads, length, size) each, keys and values shared by `groups` query heads."""
    if beginning is not None:
        k, v = (torch.cat((before, own), dim=1) for before, own in zip(beginning, (k, v), strict=True))
    k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
    length, keys = q.shape[1], k.shape[1]
    future = _future(-(-keys // 128) * 128, q.dtype)[keys - length : keys, :keys]
    scores = torch.baddbmm(future.expand(len(q), length, keys), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


@lru_cache(maxsize=16)
def _future(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Minus infinity wherever a position would see a later one."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)


def register() -> str:
    """Make it known to transformers; returns the name to load a model with."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME
