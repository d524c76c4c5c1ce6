"""Weights rounded to 4 bits and expanded again: bitsandbytes against our own way: `python -m bench.rounding`.

One layer of 4,096 by 4,096 in bfloat16, each way in turn, five times; prints the best of each, in million values a
second, and their ratio. Both give the same bits, or it fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch
from bitsandbytes import functional

from bench.machine import header
from shared.contract.spec import Quantization
from worker.train.base_model import four_bit
from worker.train.rounding import rounded_to_4_bits

WIDTH: Final = 4096
TURNS: Final = 5


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state)


def seconds(way: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def main() -> None:
    print(header(), flush=True)
    weight, config = (torch.randn(WIDTH, WIDTH) * 0.02).bfloat16(), four_bit(Quantization())
    assert torch.equal(rounded_to_4_bits(weight, config), by_bitsandbytes(weight))
    ours, theirs = [], []
    for _ in range(TURNS):
        theirs.append(seconds(lambda: by_bitsandbytes(weight)))
        ours.append(seconds(lambda: rounded_to_4_bits(weight, config)))
    rates = [weight.numel() / min(times) / 1e6 for times in (theirs, ours)]
    print(
        f"{torch.get_num_threads()} threads: bitsandbytes {rates[0]:.0f}, ours {rates[1]:.0f} million values a second"
    )
    print(f"ratio {rates[1] / rates[0]:.1f}")


if __name__ == "__main__":
    main()
