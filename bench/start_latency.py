"""Seconds from submit to the first optimizer step of the demo model, in parts: `python bench/start_latency.py`.

Jobs that start cold, then jobs that find a trainer started ahead, each kind on a server of its own over one home.
Beside them, in the same run: the floor of a cold start, a bare Python process that only imports the training stack.
The first cold job meets files that are not in the page cache.
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
from examples.stack import answering, running_stack, server_command

IMPORTS = "import torch, transformers, peft, trl, bitsandbytes; transformers.AutoModelForCausalLM; trl.SFTTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"))
    parser.add_argument("--jobs", type=int, default=3)
    arguments = parser.parse_args()
    if answering(arguments.home):
        sys.exit(f"A server runs in {arguments.home}; stop it: this starts two, with settings of its own.")
    cold = measured(arguments.home, jobs=arguments.jobs, keep_warm="off")
    warm = measured(arguments.home, jobs=arguments.jobs, keep_warm="imports")
    show(cold, warm, floor=import_seconds())


def measured(home: Path, *, jobs: int, keep_warm: str) -> list[dict[str, float]]:
    """Parts of each job on a server with this setting; with spares, each job is submitted once one waits."""
    os.environ["TUNEPOOL_KEEP_WARM"] = keep_warm
    log = home / "logs" / "worker.log"
    past = _spares(log)
    runs = []
    with running_stack(home) as credentials, tempfile.TemporaryDirectory() as folder:
        server_command("models", "fetch", MODEL, home=home)
        training = tickets.write(Path(folder))["train"]
        for number in range(1, jobs + 1):
            while keep_warm != "off" and _spares(log) < past + number:
                time.sleep(0.2)
            runs.append(first_step(credentials.client(), training))
    return runs


def _spares(log: Path) -> int:
    """How many spares have been ready since the log began."""
    return log.read_text(errors="replace").count("spare.ready") if log.exists() else 0


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


def show(cold: list[dict[str, float]], warm: list[dict[str, float]], *, floor: float) -> None:
    names = [
        f"{kind} {number}" for kind, runs in (("cold", cold), ("warm", warm)) for number in range(1, len(runs) + 1)
    ]
    table = Table("seconds", *names, title="submit to first step")
    for part in (*PARTS, "total"):
        table.add_row(part, *(f"{run.get(part, 0.0):.2f}" for run in (*cold, *warm)))
    table.add_row("total / floor", *(f"{run['total'] / floor:.2f}x" for run in (*cold, *warm)))
    Console().print(table)
    before, now = (statistics.median(run["total"] for run in runs) for runs in (cold, warm))
    print(f"median cold {before:.2f} s, warm {now:.2f} s: {before / now:.2f}x")
    print(f"floor of a cold start (imports of the training stack alone): {floor:.2f} s; {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
