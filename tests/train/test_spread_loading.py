"""A 4-bit base that ranks spread is quantised by the weight, and each rank's memory holds its own part alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.utils.quantization_config import QuantizationMethod

from shared.contract.spec import AttemptSpec
from tests.train.tiny import make_spec
from worker.train.base_model import load_model
from worker.train.spread_loading import own_part

WORLD = 3  # no divisor of the weights: the last part is the smaller one


@contextmanager
def as_rank(rank: int, *, world: int = WORLD) -> Iterator[None]:
    """This process as one of several that never answer."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def loaded(folder: Path, model: Path, *, strategy: str, **adapter: Any) -> dict[str, Linear4bit]:
    folder.mkdir(exist_ok=True)
    placement = {"strategy": strategy, "gpus": 1 if strategy == "single" else WORLD}
    file = make_spec(folder, model=model, adapter={"method": "qlora", **adapter}, placement=placement)
    spec = AttemptSpec.model_validate_json(file.read_bytes())
    network = load_model(spec, weights=model, quantized=True, trains_in_full=False)
    assert network.is_loaded_in_4bit
    assert network.config.quantization_config.quant_method == QuantizationMethod.BITS_AND_BYTES
    return {name: module for name, module in network.named_modules() if isinstance(module, Linear4bit)}


def stored(module: Linear4bit) -> torch.Tensor:
    return module.weight.data.as_subclass(torch.Tensor).view(torch.uint8)


def test_the_ranks_parts_are_together_the_whole_model(model: Path, tmp_path: Path) -> None:
    whole = loaded(tmp_path, model, strategy="single")
    parts = []
    for rank in range(WORLD):
        with as_rank(rank):
            parts.append(loaded(tmp_path, model, strategy="fsdp"))

    for name, module in whole.items():
        everything = sum(stored(part[name]).int() for part in parts)
        assert torch.equal(everything.view(-1), stored(module).int().view(-1)), name
        for part in parts:
            assert stored(part[name]).count_nonzero() < stored(module).count_nonzero() / 2, "more than its own part"
            assert torch.equal(part[name].quant_state.absmax, module.weight.quant_state.absmax)


@pytest.mark.parametrize("adapter", [{"init_lora_weights": "loftq"}, {"modules_to_save": ["norm"]}])
def test_a_start_that_reads_the_weights_has_all_of_them(model: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    whole = loaded(tmp_path, model, strategy="single")
    with as_rank(1):
        spread = loaded(tmp_path, model, strategy="fsdp", **adapter)

    for name, module in whole.items():
        assert torch.equal(stored(spread[name]).view(-1), stored(module).view(-1)), name


def test_what_belongs_to_other_ranks_takes_no_memory() -> None:
    weight = torch.ones((64 * 2**20, 1), dtype=torch.bfloat16)
    with as_rank(3, world=8):
        before = psutil.Process().memory_info().rss
        part = own_part(weight)
        grown = psutil.Process().memory_info().rss - before

    assert part.nbytes == 128 * 2**20
    assert grown < 40 * 2**20, "an eighth is 16 MiB"
    assert part[24 * 2**20 : 32 * 2**20].all()


def test_a_rank_beyond_the_last_part_holds_nothing() -> None:
    with as_rank(7, world=8):
        assert not own_part(torch.ones((5, 1), dtype=torch.bfloat16)).any()
