"""Other trainers beside ours, each in an environment of its own: `python -m bench.peers [--steps N] [--peers NAME…]`.

Makes the environments under `.peers/` (git ignores it), trains the same rows (the demo's tickets) on the same base with
the same LoRA rank, batch, steps, learning rate and seed, one side after another, each peer in float32 and in bfloat16,
and prints useful tokens/s, peak memory and held-out loss side by side. A peer that cannot be installed or run is left
out with its reason. Useful tokens are those of the rows, padding not counted; seconds are those of training, without
loading. Processor seconds are those of the whole program, loading included: where other work runs on the machine, they
say more than the clock. Peak memory is that of all the side's processes (PSS), looked at four times a second. The loss
of every adapter is measured by one program, on the base as its side stored it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from rich.console import Console
from rich.table import Table

from bench.arithmetic import dtype_of_jobs
from bench.machine import header
from bench.recipes import llama_factory
from bench.training import ALIKE, HELD_OUT, run, write_spec
from examples import tickets
from examples.stack import server_command
from shared.contract.spec import AttemptSpec, Dtype, Training
from shared.rows.convert import canonical_lines
from shared.settings import trainer_environment
from shared.settle.catalogue import SMOLLM2
from worker.program.launcher import SPINS

ROOT: Final = Path(__file__).parents[1]
TORCH: Final = "torch==2.13.0"  # a build for CPUs satisfies it where one is at hand
BATCH: Final = 5
LEARNING_RATE: Final = 1e-3
LOOK_SECONDS: Final = 0.25
RUN_SECONDS: Final = 1800.0  # of one side; what takes longer is told as that
Method = Literal["qlora", "lora"]


@dataclass(frozen=True)
class Peer:
    """Another trainer, and how its environment is made."""

    name: str
    requires: tuple[str, ...]
    imports: str
    sides: tuple[tuple[Method, Dtype], ...] = ()
    without: frozenset[str] = frozenset()  # of what it asks for: nothing of this bench needs them
    empty: tuple[str, ...] = ()  # modules that it imports and does not use here


@dataclass(frozen=True)
class Side:
    """One way to train: who, which method, which arithmetic."""

    who: str
    method: Method
    dtype: Dtype

    def __str__(self) -> str:
        return f"{self.who}, {self.method}, {self.dtype}"


@dataclass(frozen=True)
class Result:
    """What a side did, or why it did nothing."""

    side: Side
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    processor: float = 0.0  # seconds of all cores
    adapter: Path | None = None
    reason: str = ""
    loss: float | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


BOTH: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
METHODS: Final[tuple[Method, ...]] = ("qlora", "lora")
PEERS: Final = (
    Peer(
        "TRL",
        ("trl==1.16.0", "peft==0.21.2", "bitsandbytes==0.50.2"),
        imports="trl",
        sides=tuple((method, dtype) for method in ("qlora", "lora") for dtype in BOTH),
    ),
    Peer(
        "LLaMA-Factory",
        ("llamafactory==0.9.5",),
        imports="llamafactory",
        sides=tuple((method, dtype) for method in ("lora", "qlora") for dtype in BOTH),
        without=frozenset({"torch", "torchvision", "torchaudio", "gradio"}),
        empty=("torchaudio",),
    ),
    Peer("axolotl", ("axolotl==0.21.0",), imports="axolotl.train"),
    Peer("unsloth", ("unsloth==2026.10.9",), imports="unsloth"),
)


@dataclass(frozen=True)
class Cost:
    """What a program took."""

    peak_bytes: int
    processor: float


class NotHere(Exception):
    """A peer cannot be had; the message says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"), help="where the base model is cached")
    parser.add_argument("--place", type=Path, default=Path(".peers"), help="where the peers' environments are")
    parser.add_argument("--steps", type=int, default=16, help=f"of {BATCH} rows; 96 are all the demo's rows")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=BOTH, default=BOTH, help="of the peers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="the results as JSON, too")
    arguments = parser.parse_args()
    server_command("models", "fetch", SMOLLM2.ref.name, home=arguments.home)
    base = Path(server_command("models", "path", SMOLLM2.ref.name, home=arguments.home))
    dtype: Dtype = dtype_of_jobs(arguments.home)
    print(
        header(), f"arithmetic of our jobs: {dtype}", f"{arguments.steps} steps of {BATCH} rows", sep="\n", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        specs = specs_of(Path(folder), arguments.methods, base=base, steps=arguments.steps, dtype=dtype)
        results = [told(ours(spec, method, dtype=dtype)) for method, spec in specs.items()]
        tokens = results[0].tokens
        for peer in (one for one in PEERS if one.name in arguments.peers):
            results += [
                told(dataclasses.replace(result, tokens=tokens))
                for result in theirs(peer, specs, place=arguments.place.resolve(), dtypes=arguments.dtypes)
            ]
        judged = [dataclasses.replace(one, loss=loss) for one, loss in held_out(results, specs)]
    show(judged)
    if arguments.json:
        arguments.json.write_text(json.dumps([document(one) for one in judged], indent=1) + "\n", encoding="utf-8")


def told(result: Result) -> Result:
    did = result.reason or f"{result.tokens} tokens in {result.seconds:.1f} s"
    print(f"{result.side}: {did}; load now {os.getloadavg()[0]:.1f}", flush=True)
    return result


def specs_of(folder: Path, methods: Sequence[Method], *, base: Path, steps: int, dtype: Dtype) -> dict[Method, Path]:
    """The specs that our trainer reads; a peer's task is written from them."""
    files = tickets.write(folder / "tickets")
    trained, unseen = (
        list(canonical_lines(line + b"\n" for line in files[split].read_bytes().splitlines()))
        for split in ("train", "validation")
    )
    training = Training(
        learning_rate=LEARNING_RATE, num_train_epochs=1, batch_size=BATCH, max_length=512, **ALIKE, dtype=dtype
    )
    specs: dict[Method, Path] = {}
    for method in methods:
        (folder / method).mkdir()
        rows = [*trained[: steps * BATCH], *unseen[:HELD_OUT]]
        specs[method] = write_spec(folder / method, base=base, rows=rows, training=training, method=method)
    return specs


# --- the sides ------------------------------------------------------------------------------------------------------


def ours(spec: Path, method: Method, *, dtype: Dtype) -> Result:
    side, out = Side("Tunepool", method, dtype), spec.parent / "ours"
    cost = watched([sys.executable, "-m", "worker.train", str(spec), str(out)], log=spec.parent / "ours.log")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    end = next(event for event in events if event["type"] == "finished")
    return Result(
        side,
        end["trained_tokens"],
        end["train_seconds"],
        peak_bytes=cost.peak_bytes,
        processor=cost.processor,
        adapter=out / "adapter",
    )


def theirs(peer: Peer, specs: Mapping[Method, Path], *, place: Path, dtypes: Sequence[Dtype]) -> Iterable[Result]:
    """Each side of a peer; one with the reason where it cannot be had."""
    nothing = Side(peer.name, next(iter(specs)), dtypes[0])
    try:
        python = installed(peer, place)
    except NotHere as error:
        yield Result(nothing, reason=f"does not install: {error}")
        return
    if not peer.sides:
        yield Result(nothing, reason="installs; this bench has no recipe for it on a processor")
    for method, dtype in peer.sides:
        if dtype in dtypes and method in specs:
            yield side_of(Side(peer.name, method, dtype), python, specs[method])


def side_of(side: Side, python: Path, spec: Path) -> Result:
    folder = spec.parent / f"{side.who}-{side.dtype}"
    folder.mkdir()
    task = task_of(AttemptSpec.model_validate_json(spec.read_bytes()), side, out=folder)
    log = folder / "log"
    try:
        if side.who == "TRL":
            (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
            cost = watched([str(python), str(ROOT / "bench/recipes/plain_trl.py"), str(folder / "task.json")], log=log)
            seconds = float(json.loads((folder / "figures.json").read_text(encoding="utf-8"))["seconds"])
        else:
            file = llama_factory.write(task, folder)
            command = [str(python.parent / "llamafactory-cli"), "train", str(file)]
            cost = watched(command, log=log, **llama_factory.ENVIRONMENT)
            seconds = llama_factory.seconds((folder / "adapter/all_results.json").read_text(encoding="utf-8"))
    except NotHere as error:
        return Result(side, reason=str(error))
    return Result(
        side, seconds=seconds, peak_bytes=cost.peak_bytes, processor=cost.processor, adapter=folder / "adapter"
    )


def task_of(spec: AttemptSpec, side: Side, *, out: Path) -> dict[str, Any]:
    """What a peer has to do, in words of no trainer's own."""
    training, adapter = spec.job.training, spec.job.adapter
    steps = -(-spec.job.data.train_rows // training.batch_size)
    return {
        "base": spec.base_model_path,
        "rows": spec.train_file,
        "out": str(out),
        "method": side.method,
        "dtype": side.dtype,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "learning_rate": training.learning_rate,
        "batch": training.batch_size,
        "warmup_steps": round(training.warmup_ratio * steps),
        "max_length": training.max_length,
        "seed": spec.job.seed,
        "threads": spec.cpu_threads,
    }


def watched(command: Sequence[str], *, log: Path, **more: str) -> Cost:
    """Run a side to its end. Raises NotHere with its last words if it fails."""
    before = _processor_seconds()
    environment = trainer_environment(
        OMP_NUM_THREADS=str(os.cpu_count()),
        GOMP_SPINCOUNT=SPINS,
        TOKENIZERS_PARALLELISM="false",
        HF_HOME=str(log.parent / "hf"),
        HOME=str(log.parent),
        **more,
    )
    began, peak = time.monotonic(), 0
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT) as process,
    ):
        while process.poll() is None and time.monotonic() - began < RUN_SECONDS:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(LOOK_SECONDS)
        if process.poll() is None:
            process.kill()
            raise NotHere(f"did not end within {RUN_SECONDS:.0f} s")
    if process.returncode:
        raise NotHere(f"failed: {last_words(log.read_text(encoding='utf-8', errors='replace'))}")
    return Cost(peak, _processor_seconds() - before)


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def proportional_bytes(pid: int) -> int:
    """Of a process and all its children; pages that they share are counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return total
    return total


# --- environments ---------------------------------------------------------------------------------------------------


def installed(peer: Peer, place: Path) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there. Raises NotHere."""
    home = place / peer.name.lower()
    python, done = home / "bin/python", home / ".installed"
    wanted = " ".join((TORCH, *peer.requires))
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        print(f"{peer.name}: installing into {home}", flush=True)
        place.mkdir(exist_ok=True)
        (place / "constraints.txt").write_text(f"{TORCH}\n", encoding="utf-8")
        command([sys.executable, "-m", "venv", str(home)])
        pip(python, TORCH)
        install(peer, python)
        done.write_text(wanted, encoding="utf-8")
    command([str(python), "-c", f"import {peer.imports}"], **llama_factory.ENVIRONMENT)
    return python


def install(peer: Peer, python: Path) -> None:
    if not peer.without:
        pip(python, *peer.requires)
        return
    pip(python, "--no-deps", *peer.requires)
    name = re.split(r"[=<>~! ]", peer.requires[0])[0]
    asked = command([str(python), "-c", f"import importlib.metadata as m; print(*m.requires('{name}'), sep='\\n')"])
    pip(python, *needed(asked.splitlines(), without=peer.without))
    packages = command([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    for module in peer.empty:
        (Path(packages) / module).mkdir(exist_ok=True)
        (Path(packages) / module / "__init__.py").touch()


def pip(python: Path, *words: str) -> None:
    constraints = python.parents[2] / "constraints.txt"
    command([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(constraints), *words])


def command(words: Sequence[str], **more: str) -> str:
    """What a program prints. Raises NotHere with its last words."""
    done = subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(last_words(done.stdout + done.stderr))
    return done.stdout


def needed(asked: Iterable[str], *, without: frozenset[str]) -> list[str]:
    """Of the requirements that a package's metadata names: those of no extra, and not left out by name."""
    return [
        line
        for line in asked
        if "extra ==" not in line and re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") not in without
    ]


def last_words(output: str) -> str:
    """The line that says why a program ended: pip's or Python's last error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR: |[A-Za-z_.]*(Error|Exception)\b)", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


# --- what came of it ------------------------------------------------------------------------------------------------


def held_out(results: Sequence[Result], specs: Mapping[Method, Path]) -> Iterable[tuple[Result, float | None]]:
    """Each result with the loss of its adapter, measured by one program for all that stored the base alike."""
    losses: dict[str, float] = {}
    for method, spec in specs.items():
        adapters = [str(one.adapter) for one in results if one.adapter is not None and one.side.method == method]
        if adapters:
            rows = str(spec.parent / "held_out.jsonl")
            losses |= json.loads(run("bench.recipes.held_out_loss", str(spec), rows, *adapters))
    return [(one, losses.get(str(one.adapter))) for one in results]


def show(results: Sequence[Result]) -> None:
    """Ratios are those to our trainer with the same method."""
    table = Table(
        "trainer", "method", "arithmetic", "tokens/s", "ours is", "processor s", "peak memory", "held-out loss"
    )
    for cells in lines(results):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def lines(results: Sequence[Result]) -> list[tuple[str, ...]]:
    own = {one.side.method: one.rate for one in results if one.side.who == "Tunepool"}
    return [_line(one, own) for one in results]


def _line(one: Result, own: Mapping[str, float]) -> tuple[str, ...]:
    side = one.side
    if one.reason:
        return side.who, side.method, side.dtype, one.reason, *("",) * 4
    ratio = "" if side.who == "Tunepool" else f"{own[side.method] / one.rate:.2f}x"
    loss = "" if one.loss is None else f"{one.loss:.4f}"
    return (
        side.who,
        side.method,
        side.dtype,
        f"{one.rate:.0f}",
        ratio,
        f"{one.processor:.0f}",
        f"{one.peak_bytes / 2**30:.2f} GiB",
        loss,
    )


def document(one: Result) -> dict[str, Any]:
    found = dataclasses.asdict(one) | {"rate": one.rate}
    found.pop("adapter")
    return found


if __name__ == "__main__":
    main()
