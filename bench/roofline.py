"""How near a QLoRA step of the demo comes to what this machine multiplies: `python -m bench.roofline`.

First the machine: products of the step's own shapes in float32 and bfloat16, on one thread and on all. Then the step as
jobs run it (`worker.train`: packed rows, adapters, optimizer): its floating-point operations by shape, where its time
goes by part, and the share of the product rate that it reaches. Time by part is the operators' own, as torch's profiler
tells it; what no operator accounts for is Python. The step's duration is taken without the profiler. Attention by our
kernels counts in the time, and not in the operations.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from bench.arithmetic import dtype_of_jobs
from bench.cotraining import write_job
from bench.machine import header
from examples.stack import server_command
from shared.contract.spec import AttemptSpec, Dtype, FastRoad
from shared.settle.catalogue import SMOLLM2
from worker.train import cpu_attention, cpu_parts
from worker.train.__main__ import load_base, prepare
from worker.train.base_model import TORCH_DTYPES
from worker.train.loop import turns
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter
from worker.train.stopping import StopRequest

GIGA: Final = 1e9
# Parts of a step by the words in an operator's name, the first that matches; products are told apart by their shapes.
PARTS: Final = (
    ("attention by our kernels", ("kernel: attend", "kernel: weigh")),
    ("our kernels: norms, rotary, SwiGLU, loss", ("kernel:",)),
    ("attention", ("attention", "row_attention")),
    ("dequantisation", ("dequant", "bitsandbytes")),
    ("head and loss", ("softmax", "nll", "gather", "scatter", "argmax", "embedding", "index_select")),
    ("casts and copies", ("copy_", "_to_copy", "clone", "cat", "contiguous", "fill_", "zero_")),
)
PRODUCTS: Final = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Product:
    """One matrix product: (m, k) by (k, n), `batch` times."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{f'{self.batch} x ' if self.batch > 1 else ''}({self.m}, {self.k}) ({self.k}, {self.n})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"), help="where the base model is cached")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what jobs get on this machine")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--shapes", type=int, default=10, help="that are shown, the largest first")
    parser.add_argument(
        "--without", nargs="*", choices=get_args(FastRoad), default=[], help="faster roads to leave out"
    )
    arguments = parser.parse_args()
    dtype: Dtype = arguments.dtype or dtype_of_jobs(arguments.home)
    server_command("models", "fetch", SMOLLM2.ref.name, home=arguments.home)
    base = Path(server_command("models", "path", SMOLLM2.ref.name, home=arguments.home))
    print(header(), f"a step's arithmetic: {dtype}", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = AttemptSpec.model_validate_json(
            write_job(
                Path(folder), 0, base=base, rows=8 * (arguments.steps + 4), epochs=1, micro_batch=1, dtype=dtype
            ).read_bytes()
        )
        spec = spec.model_copy(update={"without": arguments.without})
        step = steps_of(spec, Path(folder) / "out")
        for _ in range(2):
            next(step)
        seconds = statistics.median(_timed(lambda: next(step)) for _ in range(arguments.steps))
        with kernels_named(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watch:
            profiled = _timed(lambda: next(step))
    products, parts = by_product(watch.events()), by_part(watch.events())
    rates = show_rates(_largest(products, arguments.shapes))
    show_products(products, rates[dtype], shown=arguments.shapes)
    show_parts(parts, profiled=profiled)
    operations = sum(product.operations * count for product, (count, _) in products.items())
    reached, best = operations / seconds / GIGA, max(rates[dtype].values())
    print(
        f"a step: {seconds:.2f} s ({profiled:.2f} s under the profiler), {operations / GIGA:,.0f} GFLOP, "
        f"{reached:.0f} GFLOP/s; the best product of these shapes in {dtype}: {best:.0f} GFLOP/s; "
        f"share {reached / best:.0%}"
    )


def steps_of(spec: AttemptSpec, out: Path) -> Iterator[None]:
    """A run as a job's trainer makes it; a step each time it is asked."""
    out.mkdir()
    torch.set_num_threads(spec.cpu_threads)
    ranks, reporter = Ranks(), Reporter(out / "events.jsonl", clock=time.time)
    stop = StopRequest(out, ranks=ranks)
    run, _ = prepare(spec, out=out, reporter=reporter, stop=stop, ranks=ranks, load_base=load_base)
    return turns(run)


@contextmanager
def kernels_named() -> Iterator[None]:
    """Show our kernels to the profiler, which knows torch's operators only."""

    def call(library: Any, name: str, *given: Any) -> None:
        with record_function(f"kernel: {name}"):
            plain(library, name, *given)

    plain = cpu_parts.call
    with patch.object(cpu_parts, "call", call), patch.object(cpu_attention, "call", call):
        yield


def by_product(events: Sequence[Any]) -> dict[Product, tuple[int, float]]:
    """How often each product was computed, and its seconds in all."""
    seen: dict[Product, tuple[int, float]] = {}
    for event in events:
        product = _product(event)
        if product is not None:
            count, seconds = seen.get(product, (0, 0.0))
            seen[product] = count + 1, seconds + event.self_cpu_time_total / 1e6
    return seen


def _product(event: Any) -> Product | None:
    if event.name not in PRODUCTS:
        return None
    left, right = [shape for shape in event.input_shapes if shape][-2:]
    batch = left[0] if len(left) == 3 else 1
    return Product(batch, left[-2], left[-1], right[-1])


def by_part(events: Sequence[Any]) -> dict[str, float]:
    """Seconds of the operators' own work, by part of the step."""
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        parts[_part(event)] += event.self_cpu_time_total / 1e6
    return dict(parts)


def _part(event: Any) -> str:
    if _within(event, "Optimizer.step"):
        return "optimizer"
    product = _product(event)
    if product is not None:
        vocabulary = SMOLLM2.ref.facts.vocab_size
        return "products of the head" if vocabulary in (product.m, product.k, product.n) else "products of layers"
    named = (part for part, words in PARTS if any(word in event.name for word in words))
    return next(named, "norms, rotary, activations and the rest")


def _within(event: Any, what: str) -> bool:
    """Whether the operator, or one that called it, has this in its name."""
    while event is not None and what not in event.name:
        event = event.cpu_parent
    return event is not None


def show_rates(products: Sequence[Product]) -> dict[str, dict[Product, float]]:
    """Measure the machine with these products; the rates on all threads, by type."""
    threads = sorted({1, os.cpu_count() or 1})
    columns = [(name, number) for name in ("float32", "bfloat16") for number in threads]
    table = Table("GFLOP/s of one product", *(f"{name}, {number} threads" for name, number in columns))
    rates: dict[str, dict[Product, float]] = {"float32": {}, "bfloat16": {}}
    for product in products:
        row = []
        for name, number in columns:
            torch.set_num_threads(number)
            rate = product.operations / _seconds(product, TORCH_DTYPES[name]) / GIGA  # type: ignore[index]
            rates[name][product] = rate  # of all threads, which come last
            row.append(f"{rate:.0f}")
        table.add_row(str(product), *row)
    Console().print(table)
    return rates


def _seconds(product: Product, dtype: torch.dtype) -> float:
    """The fastest of several: what the machine can do, whatever else it does."""
    sizes = ((product.batch,) if product.batch > 1 else (), product.m, product.k, product.n)
    left, right = (torch.randn(*sizes[0], rows, columns).to(dtype) for rows, columns in itertools.pairwise(sizes[1:]))
    out = left @ right
    return min(_timed(lambda: torch.matmul(left, right, out=out)) for _ in range(7))


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _largest(products: dict[Product, tuple[int, float]], shown: int) -> list[Product]:
    return sorted(products, key=lambda product: -product.operations * products[product][0])[:shown]


def show_products(products: dict[Product, tuple[int, float]], alone: dict[Product, float], *, shown: int) -> None:
    whole = sum(product.operations * count for product, (count, _) in products.items())
    table = Table("product", "times", "GFLOP", "part of all", "seconds", "GFLOP/s", "of the same alone")
    for product in _largest(products, shown):
        count, seconds = products[product]
        operations = product.operations * count
        rate = operations / max(seconds, 1e-9) / GIGA
        table.add_row(
            str(product),
            str(count),
            f"{operations / GIGA:.1f}",
            f"{operations / whole:.0%}",
            f"{seconds:.3f}",
            f"{rate:.0f}",
            f"{rate / alone[product]:.0%}",
        )
    Console().print(table)


def show_parts(parts: dict[str, float], *, profiled: float) -> None:
    table = Table("part of a step", "seconds", "share")
    rest = profiled - sum(parts.values())
    for part, seconds in [*sorted(parts.items(), key=lambda entry: -entry[1]), ("Python", rest)]:
        table.add_row(part, f"{seconds:.3f}", f"{seconds / profiled:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
