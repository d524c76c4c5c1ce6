"""A kernel of three lines: that it builds and runs shows that Triton's compiler, driver and cache work here.

Imported on GPUs only: PyTorch's CPU wheels come without Triton.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _count(out, n, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 -- Triton reads them
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + at, at, mask=at < n)


def count(n: int, *, device: str) -> torch.Tensor:
    """0 to n - 1 (int32, shape (n,)), each written by the kernel."""
    out = torch.zeros(n, dtype=torch.int32, device=device)
    _count[(triton.cdiv(n, BLOCK),)](out, n, block=BLOCK)
    return out
