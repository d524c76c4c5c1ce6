"""Seconds from submit to the first optimizer step of the demo model, in parts: `python bench/start_latency.py`.

Beside them, measured in the same run: the floor, a bare Python process that only imports the training stack. The first
job meets a server that has just started; later ones find files in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from tunepool.watching import follow

from examples import tickets
from examples.demo import MODEL
from examples.milestones import PARTS, Milestones
from examples.stack import running_stack, server_command

IMPORTS = "import torch, transformers, peft, trl, bitsandbytes; transformers.AutoModelForCausalLM; trl.SFTTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"))
    parser.add_argument("--jobs", type=int, default=3)
    arguments = parser.parse_args()
    with running_stack(arguments.home) as credentials, tempfile.TemporaryDirectory() as folder:
        server_command("models", "fetch", MODEL, home=arguments.home)
        training = tickets.write(Path(folder))["train"]
        runs = [first_step(credentials.client(), training) for _ in range(arguments.jobs)]
    show(runs, floor=import_seconds())


def first_step(client: OpenAI, training: Path) -> dict[str, float]:
    """Submit a job of one step and measure how it gets there."""
    file = client.files.create(file=training, purpose="fine-tune")
    milestones = Milestones()
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="latency",
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 5}}},
        extra_body={"tunepool": {"adapter": {"method": "qlora"}, "training": {"max_steps": 1, "max_length": 512}}},
    )
    for update in follow(client, job.id, interval_seconds=0.1):
        milestones.note(update)
    if update.job.status != "succeeded":
        sys.exit(f"job {job.id} has {update.job.status}: {update.job.error}")
    return milestones.to_first_step()


def import_seconds(repeat: int = 3) -> float:
    """Median seconds of a process that imports what a trainer must import."""
    spent = []
    for _ in range(repeat):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORTS], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
        spent.append(time.monotonic() - started)
    return statistics.median(spent)


def show(runs: list[dict[str, float]], *, floor: float) -> None:
    table = Table("seconds", *(f"job {number}" for number in range(1, len(runs) + 1)), title="submit to first step")
    for part in (*PARTS, "total"):
        table.add_row(part, *(f"{run.get(part, 0.0):.2f}" for run in runs))
    table.add_row("total / floor", *(f"{run['total'] / floor:.2f}x" for run in runs))
    Console().print(table)
    print(f"floor (imports of the training stack alone): {floor:.2f} s; {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
