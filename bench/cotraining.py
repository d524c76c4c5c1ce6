"""Many small jobs on one base: together, one after another, and by the classic recipe. `python -m bench.cotraining`.

Jobs of 50 rows each, unlike in rows and seed, QLoRA on the demo's model. Four ways to train k of them on one machine:

together     `worker.train.together`: one process, the base once, optimizer steps in turn
cold         `worker.train` once for each job, one after another: what a worker does with a queue
warm         the same, each by a process that imported its libraries before the clock began: the best that spares can do
classic      `bench/recipes/trl_defaults.py` once for each job: a script as tutorials have it

Seconds are those of whole processes, by the clock and of the processor; where other work runs on the machine, only the
latter says much. The sides run in turns, so that whatever else the machine does meets all of them. The makespan of k
jobs one after another is the sum of the first k. Afterwards the adapters of the largest co-training are compared with
those of the jobs alone, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table

from bench.arithmetic import dtype_of_jobs
from bench.machine import header
from bench.training import generate
from examples.stack import server_command
from shared.contract.cotraining import CotrainingSpec
from shared.contract.handover import ARGUMENT, TAKEN, WAITING, Handover
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
from shared.settings import trainer_environment
from shared.settle.catalogue import SMOLLM2
from worker.program.launcher import SPINS

SIDES: Final = ("together", "cold", "warm", "classic")


@dataclass(frozen=True)
class Run:
    """One process that trained: how long it lived and computed, when its jobs were done, what it held, what it left."""

    seconds: float
    processor: float  # seconds of all cores
    ends: tuple[float, ...]
    peak_bytes: int
    adapters: tuple[Path, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"), help="where the base model is cached")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=50, help="of each job")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a pass before packing (ours)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what jobs get on this machine")
    arguments = parser.parse_args()
    dtype: Dtype = arguments.dtype or dtype_of_jobs(arguments.home)
    server_command("models", "fetch", SMOLLM2.ref.name, home=arguments.home)
    base = Path(server_command("models", "path", SMOLLM2.ref.name, home=arguments.home))
    print(header(), f"arithmetic of all sides: {dtype}", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        specs = [
            write_job(
                Path(folder),
                number,
                base=base,
                rows=arguments.rows,
                epochs=arguments.epochs,
                micro_batch=arguments.micro_batch,
                dtype=dtype,
            )
            for number in range(max(arguments.jobs))
        ]
        runs = measured(specs, counts=sorted(arguments.jobs), sides=arguments.sides)
        show(runs, specs, counts=sorted(arguments.jobs))


def write_job(folder: Path, number: int, *, base: Path, rows: int, epochs: int, micro_batch: int, dtype: Dtype) -> Path:
    """The spec of one job, with rows and a seed of its own."""
    place = folder / f"job-{number}"
    place.mkdir()
    lines = generate(rows * (number + 1))[rows * number :]
    (place / "train.jsonl").write_bytes(b"".join(lines))
    job = JobSpec(
        base_model=SMOLLM2.ref,
        objective=Supervised(),
        data=DataFacts(format="chat", train_rows=rows),
        adapter=Adapter(method="qlora", r=16, lora_alpha=16, target_modules="all-linear"),
        quantization=Quantization(bnb_4bit_compute_dtype=dtype),
        training=Training(
            learning_rate=2e-4,
            num_train_epochs=epochs,
            batch_size=8,
            max_length=1024,
            publish="last",
            optim="adamw_torch",
            dtype=dtype,
        ),
        placement=Placement(),
        queue=Queue(),
        seed=number,
    )
    spec = AttemptSpec(
        job_id=f"ftjob-bench{number}",
        model_name=f"ft:bench:{number}",
        job=job,
        base_model_path=str(base),
        train_file=str(place / "train.jsonl"),
        micro_batch_size=micro_batch,
        cpu_threads=os.cpu_count() or 1,
        keep_dequantized=True,  # as the worker has it where 16-bit weights are under 5 % of the memory
    )
    file = place / "spec.json"
    file.write_text(spec.model_dump_json(), encoding="utf-8")
    return file


def measured(specs: list[Path], *, counts: list[int], sides: list[str]) -> dict[str, list[Run]]:
    """Every side's runs: one for each job, of co-trainings one for each count. In turns."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number, spec in enumerate(specs, 1):
        for side in sides:
            if side == "together" and number in counts:
                runs[side].append(together(specs[:number]))
            elif side == "cold":
                runs[side].append(cold(spec))
            elif side == "warm":
                runs[side].append(warm(spec))
            elif side == "classic":
                runs[side].append(classic(spec))
            if runs[side]:
                last = runs[side][-1]
                print(f"job {number}, {side}: {last.seconds:.1f} s, {last.processor:.1f} of the processor", flush=True)
    return runs


def together(specs: list[Path]) -> Run:
    out = specs[0].parent.parent / f"together-{len(specs)}"
    attempts = [AttemptSpec.model_validate_json(spec.read_bytes()) for spec in specs]
    file = out.with_suffix(".json")
    file.write_text(CotrainingSpec(trainees=attempts).model_dump_json(), encoding="utf-8")
    began = time.time()
    spent = lifetime("worker.train.together", str(file), str(out))
    return ours([out / attempt.job_id for attempt in attempts], began=began, spent=spent)


def cold(spec: Path) -> Run:
    out, began = spec.parent / "cold", time.time()
    spent = lifetime("worker.train", str(spec), str(out))
    return ours([out], began=began, spent=spent)


def warm(spec: Path) -> Run:
    """By a process that waits for its work, as a worker's spare does. The clock begins with the handover."""
    out = spec.parent / "warm"
    out.mkdir()
    line, its = socket.socketpair()
    with line, its:
        command = [sys.executable, "-m", "worker.train", ARGUMENT, str(its.fileno())]
        process = subprocess.Popen(command, env=environment(), pass_fds=(its.fileno(),), stderr=subprocess.PIPE)
        its.close()
        _hear(line, WAITING)
        clock, began, before = time.monotonic(), time.time(), _computed()
        imports = sum(psutil.Process(process.pid).cpu_times()[:2])
        line.sendall(Handover(spec=str(spec), out=str(out)).model_dump_json().encode() + b"\n")
        _hear(line, TAKEN)
        _, errors = process.communicate()
        spent = time.monotonic() - clock, _computed() - before - imports
    if process.returncode:
        sys.exit(f"A warm trainer has failed:\n{errors.decode(errors='replace')[-4000:]}")
    return ours([out], began=began, spent=spent)


def _computed() -> float:
    """Processor seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _hear(line: socket.socket, word: bytes) -> None:
    heard = b""
    while heard != word:
        piece = line.recv(len(word) - len(heard))
        if not piece:
            sys.exit(f"A trainer that was started ahead ended before it said {word!r}.")
        heard += piece


def classic(spec: Path) -> Run:
    out = spec.parent / "classic"
    seconds, processor = lifetime("bench.recipes.trl_defaults", str(spec), str(out))
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    return Run(seconds, processor, (seconds,), figures["peak_bytes"], (out / "adapter",))


def ours(outs: list[Path], *, began: float, spent: tuple[float, float]) -> Run:
    finished = [json.loads((out / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1]) for out in outs]
    if {event["type"] for event in finished} != {"finished"}:
        sys.exit(f"A job has not finished: {finished}")
    return Run(
        *spent,
        tuple(event["time"] - began for event in finished),
        max(event["peak_memory_bytes"] for event in finished),
        tuple(out / "adapter" for out in outs),
    )


def lifetime(module: str, *words: str) -> tuple[float, float]:
    """Seconds, and processor seconds, of a program that is run as a worker runs its trainer."""
    began, before = time.monotonic(), _computed()
    done = subprocess.run(
        [sys.executable, "-m", module, *words], env=environment(), text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{module} has failed:\n{done.stderr[-4000:]}")
    return time.monotonic() - began, _computed() - before


def environment() -> dict[str, str]:
    return trainer_environment(
        OMP_NUM_THREADS=str(os.cpu_count()),
        GOMP_SPINCOUNT=SPINS,
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def show(runs: dict[str, list[Run]], specs: list[Path], *, counts: list[int]) -> None:
    table = Table("", *(f"{count} jobs" if count > 1 else "1 job" for count in counts), title="seconds")
    for name, of in (("makespan", attrgetter("seconds")), ("processor", attrgetter("processor"))):
        makespans = {side: _sums(side, [of(run) for run in runs[side]], counts) for side in SIDES if runs[side]}
        for side, seconds in makespans.items():
            table.add_row(f"{name}, {side}", *(f"{value:.1f}" for value in seconds))
        for side in [side for side in makespans if side != "together" and "together" in makespans]:
            ratios = [theirs / ours for theirs, ours in zip(makespans[side], makespans["together"], strict=True)]
            table.add_row(f"{name}, {side} / together", *(f"{ratio:.2f}x" for ratio in ratios))
    for side in makespans:
        means = _mean_ends(side, runs[side], counts)
        table.add_row(f"a job's end on average, {side}", *(f"{mean:.1f}" for mean in means))
    for side in makespans:
        peaks = [run.peak_bytes / 2**30 for run in runs[side]]
        shown = peaks if side == "together" else [max(peaks[:count]) for count in counts]
        table.add_row(f"peak memory, GiB, {side}", *(f"{peak:.2f}" for peak in shown))
    Console().print(table)
    if runs["together"] and runs["cold"]:
        print(_equal(runs["together"][-1], runs["cold"]))


def _sums(side: str, figures: list[float], counts: list[int]) -> list[float]:
    """Until the last of so many jobs is done."""
    return figures if side == "together" else [sum(figures[:count]) for count in counts]


def _mean_ends(side: str, runs: list[Run], counts: list[int]) -> list[float]:
    if side == "together":
        return [statistics.mean(run.ends) for run in runs]
    ends = [sum(run.seconds for run in runs[:number]) + run.ends[0] for number, run in enumerate(runs)]
    return [statistics.mean(ends[:count]) for count in counts]


def _equal(largest: Run, alone: list[Run]) -> str:
    name = "adapter_model.safetensors"
    pairs = zip(largest.adapters, (run.adapters[0] for run in alone), strict=True)
    equal = sum((ours / name).read_bytes() == (theirs / name).read_bytes() for ours, theirs in pairs)
    return (
        f"adapters of the largest co-training that equal, byte for byte, those of jobs alone: {equal} of {len(alone)}"
    )


if __name__ == "__main__":
    main()
