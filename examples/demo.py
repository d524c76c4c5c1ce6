"""The main job, end to end: a real 135M model learns to write tickets, through the real API, queue, worker and store.

    python -m examples.demo [--home DIR]

Nothing here is special to this project but the base URL: files and job are made with the official `openai` client.
Exit code 0 when the tuned model is clearly better on messages it has never seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.status import Status
from rich.table import Table
from tunepool import adapters
from tunepool.watching import ProgressBar, follow, ours

from examples import tickets
from examples.milestones import Milestones
from examples.stack import StackFailed, running_stack, server_command

MODEL: Final = "smollm2-135m-instruct"
CLEARLY_BETTER: Final = 0.5  # share of held-out messages by which the tuned model must be ahead
POLL_SECONDS: Final = 0.2
LINE_SECONDS: Final = 10.0  # between two lines of progress where there is no terminal
MODELS: Final = {
    "base": "base model",
    "tuned": "tuned model, on the 4-bit base it was trained on",
    "tuned_16_bit": "the same adapter on the published 16-bit base",
}
EXTENSION: Final = {
    "adapter": {"method": "qlora", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "quantization": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "training": {"learning_rate": 1e-3, "max_length": 512, "optim": "paged_adamw_8bit"},
    # An earlier demo that was killed may have left a job in the queue.
    "queue": {"group": "demo", "supersede": True},
}
console = Console()


def main() -> int:
    """Run the demo; 0 when it shows what it promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"))
    home = parser.parse_args().home
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(home)
    except KeyboardInterrupt:
        console.print("Interrupted; everything is stopped.")
        return 130
    except StackFailed as error:
        console.print(str(error), style="red", markup=False)
        return 3


def run(home: Path) -> int:
    """The acts in order."""
    work = home / "demo"
    data = tickets.write(work / "data")
    watch = Stopwatch()
    with ExitStack() as stack:
        with watch("start", "Starting Postgres, Valkey, API and worker"):
            credentials = stack.enter_context(running_stack(home))
        client = credentials.client()
        with watch("fetch", f"Fetching {MODEL}"):
            server_command("models", "fetch", MODEL, home=home)
        base = Path(server_command("models", "path", MODEL, home=home))
        job, milestones = train(client, data)
        if job.status != "succeeded":
            console.print(
                f"The job has {job.status}. {job.error.message if job.error else ''}", style="red", markup=False
            )
            return 1
        with watch("download", "Downloading the adapter"):
            shutil.rmtree(work / "adapter", ignore_errors=True)
            adapters.download(client, str(job.fine_tuned_model), out=work / "adapter")
            location = adapters.describe(client, str(job.fine_tuned_model))["location"]
    with watch("answers", "Asking the base and the tuned model") as say:
        answers = ask(base, adapter=work / "adapter", held_out=data["held_out"], say=say)
    figures = summary(job, milestones, seconds=watch.seconds, answers=answers, adapter=work / "adapter")
    figures["location"] = location
    (home / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    show(figures, answers["rows"], adapter=work / "adapter", home=home)
    return 0 if figures["tuned"]["exact"] >= figures["base"]["exact"] + CLEARLY_BETTER else 1


def train(client: OpenAI, data: dict[tickets.Split, Path]) -> tuple[FineTuningJob, Milestones]:
    """Upload, submit and follow the job to its end; Ctrl-C cancels it."""
    training_file = client.files.create(file=data["train"], purpose="fine-tune")
    validation_file = client.files.create(file=data["validation"], purpose="fine-tune")
    milestones = Milestones()
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=training_file.id,
        validation_file=validation_file.id,
        suffix="tickets",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 5}}},
        extra_body={"tunepool": EXTENSION},
    )
    try:
        with ProgressBar(console) as bar:
            for update in follow(client, job.id, interval_seconds=POLL_SECONDS):
                milestones.note(update)
                bar.show(update)
    except KeyboardInterrupt:
        client.fine_tuning.jobs.cancel(job.id)
        raise
    return update.job, milestones


def ask(base: Path, *, adapter: Path, held_out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Both models' answers, from a process that knows nothing of this project. It tells how far it is."""
    command = [sys.executable, "-W", "ignore", "-m", "examples.answers", *map(str, (base, adapter, held_out))]
    # Threads that spin long for each other (libgomp's default) hardly get on where anything else runs.
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    line: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            for text in process.stdout or ():
                line = json.loads(text)
                if "share" in line:
                    say(f"{line['share']:.0%}")
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise StackFailed(f"The answers did not come:\n{errors.read()[-2000:]}")
    return line


def summary(
    job: FineTuningJob, milestones: Milestones, *, seconds: dict[str, float], answers: dict[str, Any], adapter: Path
) -> dict[str, Any]:
    """Every figure of this run; seconds are wall-clock seconds of this client."""
    attempts = ours(job).get("attempts") or [{}]
    return {
        "model": MODEL,
        "fine_tuned_model": job.fine_tuned_model,
        "rows": tickets.ROWS,
        "steps": milestones.last_step,
        "trained_tokens": job.trained_tokens,
        "train_loss": milestones.train_loss,
        "seconds": {
            **seconds,
            "submit_to_first_step": milestones.to_first_step(),
            "training": milestones.training_seconds(),
            "publishing": milestones.publishing_seconds(),
        },
        "trainer_peak_bytes": attempts[-1].get("peak_memory_bytes"),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file()),
        **{who: rates(answers["rows"], who) for who in MODELS},
        "environment": {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def rates(rows: list[dict[str, str]], who: str) -> dict[str, float]:
    """Shares of answers that are one JSON object, and that are the very ticket expected."""
    tickets_given = [_parsed(row[who]) for row in rows]
    exact = sum(given == json.loads(row["expected"]) for given, row in zip(tickets_given, rows, strict=True))
    return {
        "valid_json": round(sum(given is not None for given in tickets_given) / len(rows), 4),
        "exact": round(exact / len(rows), 4),
    }


def _parsed(answer: str) -> dict[str, Any] | None:
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def show(figures: dict[str, Any], rows: list[dict[str, str]], *, adapter: Path, home: Path) -> None:
    """What a reader wants to see: answers side by side, rates, where the time went, where the adapter lies."""
    answers = Table("held-out message", "base model", "tuned model", title="Unseen messages", show_lines=True)
    for row in rows[:4]:
        answers.add_row(row["message"], row["base"], row["tuned"])
    console.print(answers)

    table = Table("", "valid JSON", "exactly right", title=f"{len(rows)} held-out messages")
    for who, said in MODELS.items():
        table.add_row(said, f"{figures[who]['valid_json']:.0%}", f"{figures[who]['exact']:.0%}")
    console.print(table)

    seconds = figures["seconds"]
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds["submit_to_first_step"].items())
    console.print(f"Submit to first optimizer step, seconds: {parts}", highlight=False)
    console.print(f"Training: {figures['steps']} steps in {seconds['training']:.1f} s", highlight=False)
    console.print(f"Adapter {figures['fine_tuned_model']}", highlight=False, soft_wrap=True)
    console.print(f"in the store: {figures['location']}", highlight=False, soft_wrap=True)
    console.print(f"downloaded, a plain PEFT directory: {adapter}", highlight=False, soft_wrap=True)
    for path in sorted(adapter.rglob("*")):
        if path.is_file():
            console.print(f"  {path.stat().st_size:>12,}  {path.relative_to(adapter)}", highlight=False)
    console.print(f"All figures: {home / 'demo.json'}", highlight=False)


class Stopwatch:
    """Says what goes on and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._spoke_at = 0.0

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[Callable[[str], None]]:
        started = time.monotonic()
        with console.status(what) as status:
            yield lambda words: self._say(status, f"{what}: {words}")
        self.seconds[name] = round(time.monotonic() - started, 2)
        console.print(f"{what}: {self.seconds[name]:.1f} s", highlight=False)

    def _say(self, status: Status, words: str) -> None:
        """On a terminal in place of what was said before; elsewhere it is a line, one in ten seconds at most."""
        if console.is_terminal:
            status.update(words)
        elif time.monotonic() - self._spoke_at >= LINE_SECONDS:
            self._spoke_at = time.monotonic()
            console.print(words, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
