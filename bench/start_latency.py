"""Seconds from submit to the first optimizer step of the demo model, in parts: `python bench/start_latency.py`.

Jobs that start cold (`off`), jobs that find a trainer started ahead (`imports`), and jobs that find one that holds
their base model too (`base`), each kind on a server of its own over one home. Beside them, in the same run: the floor
of a cold start, a bare Python process that only imports the training stack. The first cold job meets files that are
not in the page cache, a base model that nobody has quantised on this host yet, and rows that nobody has read; the
others find what is kept of the base, and their rows, which are the same, are not read again before the queue.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from tunepool.watching import follow

from bench.machine import header
from examples import tickets
from examples.demo import MODEL
from examples.milestones import PARTS, Milestones
from examples.stack import answering, running_stack, server_command

KINDS = ("off", "imports", "base")
IMPORTS = "import torch, transformers, peft, trl, bitsandbytes; transformers.AutoModelForCausalLM; trl.SFTTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"))
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    if answering(arguments.home):
        sys.exit(f"A server runs in {arguments.home}; stop it: this starts several, with settings of its own.")
    print(header())
    forget_prepared(arguments.home)
    runs = {kind: measured(arguments.home, jobs=arguments.jobs, keep_warm=kind) for kind in arguments.kinds}
    show(runs, floor=import_seconds())


def forget_prepared(home: Path) -> None:
    """So that the first job is the first that this host sees of its base model and its rows."""
    for left in (*(home / "cache" / "models").glob("prepared-*"), home / "prepare", home / "rows-read"):
        shutil.rmtree(left, ignore_errors=True)


def measured(home: Path, *, jobs: int, keep_warm: str) -> list[dict[str, float]]:
    """Parts of each job on a server with this setting. Each is submitted to a worker that has nothing left to do.

    With `base`, the first job tells the worker which base model that is, and is not measured.
    """
    os.environ["TUNEPOOL_KEEP_WARM"] = keep_warm
    log = Log(home / "logs" / "worker.log")
    runs = []
    with running_stack(home) as credentials, tempfile.TemporaryDirectory() as folder:
        server_command("models", "fetch", MODEL, home=home)
        training = tickets.write(Path(folder))["train"]
        if keep_warm == "base":
            first_step(credentials.client(), training)
        for _ in range(jobs):
            while pending(home) or not log.waits(keep_warm):
                time.sleep(0.2)
            runs.append(first_step(credentials.client(), training))
    return runs


def pending(home: Path) -> bool:
    """Whether a form of a base model is being made."""
    return any((home / "prepare").glob("*.json"))


class Log:
    """What the worker has logged since this was made."""

    def __init__(self, file: Path) -> None:
        self._file, self._begin = file, file.stat().st_size if file.exists() else 0

    def waits(self, keep_warm: str) -> bool:
        """Whether the last that was said of a trainer's spare is that it waits, with what it is to hold."""
        if keep_warm == "off":
            return True
        told = self._file.read_bytes()[self._begin :].decode(errors="replace") if self._file.exists() else ""
        said = re.findall(r"spare\.(\w+)(.*)", re.sub(r"\x1b\[[0-9;]*m", "", told))
        words = [word for word in said if "an evaluation" not in word[1]]  # evaluations have a spare of their own
        if not words or words[-1][0] != "ready":
            return False
        return keep_warm != "base" or f"base={MODEL}" in words[-1][1]


def first_step(client: OpenAI, training: Path) -> dict[str, float]:
    """Submit a job of two steps and measure how it gets to the end of the first; `a step` is what the second took."""
    file = client.files.create(file=training, purpose="fine-tune")
    milestones = Milestones()
    steps: dict[int, float] = {}
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="latency",
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 5}}},
        extra_body={
            "tunepool": {
                "adapter": {"method": "qlora"},
                "training": {"max_steps": 2, "logging_steps": 1, "max_length": 512},
            }
        },
    )
    for update in follow(client, job.id, interval_seconds=0.1):
        milestones.note(update)
        told = [
            event.data for event in update.events if isinstance(event.data, dict) and "seconds_per_step" in event.data
        ]
        steps |= {data["step"]: data["seconds_per_step"] for data in told}
    if update.job.status != "succeeded":
        sys.exit(f"job {job.id} has {update.job.status}: {update.job.error}")
    parts = milestones.to_first_step()
    return {**parts, "a step": steps[2], "beyond a step": parts["total"] - steps[2]}


def import_seconds(repeat: int = 3) -> float:
    """Median seconds of a process that imports what a trainer must import."""
    spent = []
    for _ in range(repeat):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORTS], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
        spent.append(time.monotonic() - started)
    return statistics.median(spent)


def show(runs: dict[str, list[dict[str, float]]], *, floor: float) -> None:
    names = [f"{kind} {number}" for kind, of_kind in runs.items() for number in range(1, len(of_kind) + 1)]
    table = Table("seconds", *names, title="submit to first step")
    every = [run for of_kind in runs.values() for run in of_kind]
    for part in (*PARTS, "total", "a step", "beyond a step"):
        table.add_row(part, *(f"{run.get(part, 0.0):.2f}" for run in every))
    table.add_row("total / floor", *(f"{run['total'] / floor:.2f}x" for run in every))
    Console(width=max(80, 16 + 12 * len(names))).print(table)
    for kind, of_kind in runs.items():
        total, beyond = (statistics.median(run[part] for run in of_kind) for part in ("total", "beyond a step"))
        print(f"KEEP_WARM={kind}: median {total:.2f} s, {beyond:.2f} s of it beyond a step")
    print(f"floor of a cold start (imports of the training stack alone): {floor:.2f} s")


if __name__ == "__main__":
    main()
