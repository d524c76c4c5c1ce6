"""Useful tokens per second of our QLoRA path against the classic recipe: `python -m bench.training [--data FILE]`.

About five minutes on two cores without bfloat16; `--rows 96 --epochs 2` says more where they have it.

Both sides run as programs of their own, in turns, on the same four-bit model, rows, labels, LoRA, learning rate,
epochs, effective batch and seed, in the dtype that jobs get on this machine. Ours is the trainer that jobs run
(`worker.train`); the other one is TRL as tutorials use it (`bench/recipes/trl_defaults.py`). Useful tokens are those of
the rows, padding not counted; seconds are those within optimizer steps. Afterwards one third program measures both
adapters on the same held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table

from bench.arithmetic import dtype_of_jobs
from bench.machine import header
from examples.stack import server_command
from shared.contract.spec import (
    Adapter,
    AttemptSpec,
    DataFacts,
    Dtype,
    JobSpec,
    Placement,
    Quantization,
    Queue,
    Supervised,
    Training,
)
from shared.rows.convert import canonical_lines
from shared.settings import trainer_environment
from shared.settle.catalogue import SMOLLM2
from worker.program.launcher import SPINS

SEED: Final = 7
HELD_OUT: Final = 32
TASKS: Final[tuple[tuple[str, Callable[[list[str]], str]], ...]] = (
    ("Write these words in capital letters:", lambda words: " ".join(words).upper()),
    ("Sort these words by the alphabet:", lambda words: ", ".join(sorted(words))),
    ("Number these words, one per line:", lambda words: "\n".join(f"{n}. {w}" for n, w in enumerate(words, 1))),
    ("Write these words in reverse order:", lambda words: " ".join(reversed(words))),
    ("How many words are these? Then repeat them.", lambda words: f"{len(words)}: {' '.join(words)}"),
)
WORDS: Final = (
    "river",
    "stone",
    "window",
    "market",
    "garden",
    "paper",
    "engine",
    "yellow",
    "winter",
    "bottle",
    "travel",
    "simple",
    "number",
    "letter",
    "island",
    "copper",
    "silver",
    "forest",
    "bridge",
    "candle",
    "pocket",
    "planet",
    "summer",
    "ticket",
    "valley",
    "doctor",
    "mirror",
    "carpet",
    "button",
    "hammer",
)


# "auto" chooses this optimizer for an adapter on a CPU; the classic recipe pages 8-bit moments.
ALIKE: Final[dict[str, Any]] = {"publish": "last", "optim": "adamw_torch"}


@dataclass(frozen=True)
class Figures:
    """What one side did in one round."""

    tokens: int
    seconds: float
    peak_bytes: int
    adapter: Path

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"), help="where the base model is cached")
    parser.add_argument("--data", type=Path, help="Alpaca JSON or chat JSONL; default: generated rows of mixed lengths")
    parser.add_argument("--rows", type=int, default=48, help="training rows; as many are taken from the file")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what jobs get on this machine")
    arguments = parser.parse_args()
    server_command("models", "fetch", SMOLLM2.ref.name, home=arguments.home)
    base = Path(server_command("models", "path", SMOLLM2.ref.name, home=arguments.home))
    dtype: Dtype = arguments.dtype or dtype_of_jobs(arguments.home)
    print(header(), f"arithmetic of both sides: {dtype}", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = read(arguments.data) if arguments.data else generate(arguments.rows + HELD_OUT)
        training = Training(
            learning_rate=2e-4, num_train_epochs=arguments.epochs, batch_size=8, max_length=1024, **ALIKE, dtype=dtype
        )
        spec = write_spec(Path(folder), base=base, rows=rows[: arguments.rows + HELD_OUT], training=training)
        rounds = [(ours(spec, number), classic(spec, number)) for number in range(arguments.rounds)]
        losses = held_out(spec, [side.adapter for side in rounds[-1]])
    show(rounds, losses, rows=arguments.rows, epochs=arguments.epochs)


def generate(count: int) -> list[bytes]:
    """Chat rows whose lengths are spread as in instruction data: many short, some long."""
    dice = random.Random(SEED)
    return list(canonical_lines(json.dumps(_row(dice)).encode() + b"\n" for _ in range(count)))


def _row(dice: random.Random) -> dict[str, Any]:
    words = dice.choices(WORDS, k=min(150, 4 + int(dice.lognormvariate(3.0, 0.9))))
    task, solve = dice.choice(TASKS)
    turns = [("user", f"{task} {' '.join(words)}"), ("assistant", solve(words))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def read(file: Path) -> list[bytes]:
    """The file's rows as canonical JSONL, in an order that the seed decides."""
    lines = list(canonical_lines(_json_lines(file.read_bytes())))
    random.Random(SEED).shuffle(lines)
    return lines


def _json_lines(content: bytes) -> Iterator[bytes]:
    if content.lstrip()[:1] != b"[":
        return iter([content])
    return (json.dumps(row).encode() + b"\n" for row in json.loads(content))


def write_spec(
    folder: Path, *, base: Path, rows: list[bytes], training: Training, method: Literal["qlora", "lora"] = "qlora"
) -> Path:
    """`folder/spec.json`, read by all programs; the last rows are held out."""
    (folder / "train.jsonl").write_bytes(b"".join(rows[:-HELD_OUT]))
    (folder / "held_out.jsonl").write_bytes(b"".join(rows[-HELD_OUT:]))
    job = JobSpec(
        base_model=SMOLLM2.ref,
        objective=Supervised(),
        data=DataFacts(format="chat", train_rows=len(rows) - HELD_OUT),
        adapter=Adapter(method=method, r=16, lora_alpha=16, target_modules="all-linear"),
        quantization=Quantization(load_in_4bit=method == "qlora", bnb_4bit_compute_dtype=training.dtype),
        training=training,
        placement=Placement(),
        queue=Queue(),
        seed=SEED,
    )
    spec = AttemptSpec(
        job_id="ftjob-bench",
        model_name="ft:bench",
        job=job,
        base_model_path=str(base),
        train_file=str(folder / "train.jsonl"),
        micro_batch_size=1,
        cpu_threads=os.cpu_count() or 1,
        keep_dequantized=True,  # as the worker has it where 16-bit weights are under 5 % of the memory
    )
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    return folder / "spec.json"


def ours(spec: Path, number: int) -> Figures:
    out = spec.parent / f"ours-{number}"
    run("worker.train", str(spec), str(out))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    end = next(event for event in events if event["type"] == "finished")
    return Figures(end["trained_tokens"], end["train_seconds"], end["peak_memory_bytes"], out / "adapter")


def classic(spec: Path, number: int) -> Figures:
    out = spec.parent / f"classic-{number}"
    run("bench.recipes.trl_defaults", str(spec), str(out))
    return Figures(**json.loads((out / "figures.json").read_text(encoding="utf-8")), adapter=out / "adapter")


def held_out(spec: Path, adapters: list[Path]) -> list[float]:
    """Loss of the base model, then of each adapter."""
    names = [str(adapter) for adapter in adapters]
    losses = json.loads(run("bench.recipes.held_out_loss", str(spec), str(spec.parent / "held_out.jsonl"), *names))
    return [losses[name] for name in ("base", *names)]


def run(module: str, *words: str) -> str:
    """Run a program as the worker runs its trainer; returns what it prints."""
    environment = trainer_environment(
        OMP_NUM_THREADS=str(os.cpu_count()),
        GOMP_SPINCOUNT=SPINS,
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    done = subprocess.run(
        [sys.executable, "-m", module, *words], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{module} has failed:\n{done.stderr[-4000:]}")
    return done.stdout


def show(rounds: list[tuple[Figures, Figures]], losses: list[float], *, rows: int, epochs: int) -> None:
    table = Table("", "ours", "classic", "ratio", title=f"{rows} rows x {epochs} epochs, {rounds[0][0].tokens} tokens")
    for number, (our, their) in enumerate(rounds, 1):
        table.add_row(
            f"useful tokens/s, round {number}", f"{our.rate:.0f}", f"{their.rate:.0f}", f"{our.rate / their.rate:.2f}x"
        )
    our, their = (statistics.median(one.rate for one in side) for side in zip(*rounds, strict=True))
    table.add_row("useful tokens/s, median", f"{our:.0f}", f"{their:.0f}", f"{our / their:.2f}x")
    table.add_row("held-out loss", f"{losses[1]:.4f}", f"{losses[2]:.4f}", f"base {losses[0]:.4f}")
    peaks = [max(one.peak_bytes for one in side) / 2**30 for side in zip(*rounds, strict=True)]
    table.add_row("peak memory, GiB", f"{peaks[0]:.2f}", f"{peaks[1]:.2f}", f"{peaks[0] / peaks[1]:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
