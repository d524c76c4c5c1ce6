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
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.status import Status
from rich.table import Table
from tunepool import adapters
from tunepool.watching import EventLines, ProgressBar, Update, follow, ours

from examples import pace, tickets
from examples.asking import asking
from examples.life import QUIET_SECONDS, Pulse, Voice
from examples.milestones import Milestones
from examples.stack import StackFailed, running_stack, server_command, started_command

MODEL: Final = "smollm2-135m-instruct"
CLEARLY_BETTER: Final = 0.5  # share of held-out messages by which the tuned model must be ahead
POLL_SECONDS: Final = 0.2
WARM_UP_STEPS: Final = 3  # after the first, which takes longer; by them the number of tickets is chosen
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
console = Voice()
pulse = Pulse(console)


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
        fetched = stack.enter_context(started_command("models", "fetch", MODEL, home=home))
        with watch("start", f"Starting Postgres, Valkey, API and worker, while {MODEL} is fetched"):
            credentials = stack.enter_context(running_stack(home))
        client = credentials.client()
        with watch("fetch", f"Fetching the rest of {MODEL}"):
            fetched()
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
        # While the server stops they load their models.
        with asking(base, adapter=work / "adapter", held_out=data["held_out"]) as models:
            with watch("stop", "Stopping the server"):
                stack.close()
            with watch("answers", "Asking the base and the tuned model") as say:
                rows = models.rows(say)
    figures = summary(job, milestones, seconds=watch.seconds, rows=rows, adapter=work / "adapter")
    figures["location"] = location
    (home / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    show(figures, rows, adapter=work / "adapter", home=home)
    return 0 if figures["tuned"]["exact"] >= figures["base"]["exact"] + CLEARLY_BETTER else 1


def train(client: OpenAI, data: dict[tickets.Split, Path]) -> tuple[FineTuningJob, list[Milestones]]:
    """Upload, submit and follow the job to its end; where it would take too long, once more with fewer tickets."""
    validation = client.files.create(file=data["validation"], purpose="fine-tune").id
    job, first, fewer = train_on(client, data["train"], validation, choose=pace.fewer)
    if fewer is None:
        return job, [first]
    lines = data["train"].read_text(encoding="utf-8").splitlines(keepends=True)[:fewer]
    part = data["train"].with_name(f"train-{fewer}.jsonl")
    part.write_text("".join(lines), encoding="utf-8")
    job, second, _ = train_on(client, part, validation, choose=lambda _: None)
    return job, [first, second]


def train_on(
    client: OpenAI, rows: Path, validation: str, *, choose: Callable[[float], int | None]
) -> tuple[FineTuningJob, Milestones, int | None]:
    """One job to its end; Ctrl-C cancels it.

    Args:
        choose: how many tickets are better, from the seconds of a step; None: those that it has. Asked once, after the
            first steps. What it names is returned, and the job is cancelled.
    """
    milestones, fewer = Milestones(), None
    job = submit(client, client.files.create(file=rows, purpose="fine-tune").id, validation)
    told, chosen = "submitted", False
    bar: ProgressBar | EventLines = (
        ProgressBar(console) if console.is_terminal else EventLines(console, step_seconds=QUIET_SECONDS)
    )
    try:
        with bar, pulse.during(lambda: told):
            for update in follow(client, job.id, interval_seconds=POLL_SECONDS):
                milestones.note(update)
                bar.show(update)
                told = standing(update, milestones)
                step_seconds = milestones.step_seconds(steps=WARM_UP_STEPS)
                if step_seconds is None or chosen:
                    continue
                chosen, fewer = True, choose(step_seconds)
                if fewer is not None:
                    console.print(pace.words(step_seconds, fewer), highlight=False)
                    client.fine_tuning.jobs.cancel(job.id)
    except KeyboardInterrupt:
        client.fine_tuning.jobs.cancel(job.id)
        raise
    return update.job, milestones, fewer


def submit(client: OpenAI, training_file: str, validation_file: str) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=training_file,
        validation_file=validation_file,
        suffix="tickets",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": pace.BATCH}}},
        extra_body={"tunepool": EXTENSION},
    )


def standing(update: Update, milestones: Milestones) -> str:
    """The job in a few words, for who sees no bar."""
    if milestones.last_step:
        return f"{update.job.status}: step {milestones.last_step} is done"
    if update.job.status == "running":
        return "running: the first step" if milestones.loaded else "running: its model loads"
    return update.job.status


def summary(
    job: FineTuningJob,
    milestones: list[Milestones],
    *,
    seconds: dict[str, float],
    rows: list[dict[str, str]],
    adapter: Path,
) -> dict[str, Any]:
    """Every figure of this run; seconds are wall-clock seconds of this client."""
    attempts = ours(job).get("attempts") or [{}]
    first, last = milestones[0], milestones[-1]
    return {
        "model": MODEL,
        "fine_tuned_model": job.fine_tuned_model,
        "rows": {**tickets.ROWS, "train": last.last_step * pace.BATCH},
        "steps": last.last_step,
        "trained_tokens": job.trained_tokens,
        "train_loss": last.train_loss,
        "seconds": {
            **seconds,
            "submit_to_first_step": first.to_first_step(),
            "warm_up": first.training_seconds() if first is not last else 0.0,
            "training": last.training_seconds(),
            "publishing": last.publishing_seconds(),
        },
        "trainer_peak_bytes": attempts[-1].get("peak_memory_bytes"),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file()),
        **{who: rates(rows, who) for who in MODELS},
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
        self._words = ""

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[Callable[[str], None]]:
        started = time.monotonic()
        self._words = what
        with console.status(what) as status, pulse.during(lambda: self._words):
            yield lambda words: self._say(status, f"{what}: {words}")
        self.seconds[name] = round(time.monotonic() - started, 2)
        console.print(f"{what}: {self.seconds[name]:.1f} s", highlight=False)

    def _say(self, status: Status, words: str) -> None:
        """On a terminal in place of what was said before; elsewhere the next beat says it."""
        self._words = words
        status.update(words)


if __name__ == "__main__":
    sys.exit(main())
