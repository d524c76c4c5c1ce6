"""What a pipeline costs beside its training and its answers: `python bench/pipeline.py [--answers 200]`.

Runs the demo's task as `tunepool run` on a stack of its own (or the one of `--home` that runs already), a few steps
long: the training, then evaluate, gate and promote of what it made, then the same push again. Prints the wall and
processor seconds of the last, and those of evaluate, gate and promote (all processes of the stack together) beyond the
answers themselves, which the same code gives in this process, beside transformers' own batched `generate` on the same
model and adapter. On a machine with other work, read the processor seconds.

`--model` is the built-in one, which must be in the home's cache or is fetched, or `random`: four layers of random
weights, which end the whole within minutes on a slow machine. What a pipeline costs beyond its model is the same.

The stack is idle: the evaluation begins once a program for it was started ahead, as on a worker that has nothing to do.
With `--cold` none is, and its imports are in the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from peft import PeftModel
from transformers import LlamaConfig
from tunepool import adapters
from tunepool.connection import Credentials

from bench.evaluation import Stand
from bench.machine import header
from examples import tickets
from examples.stack import running_stack, server_command
from tests.train.tiny import make_model_directory
from worker.train.answering import ModelRunner

BUILT_IN = "smollm2-135m-instruct"
RANDOM = LlamaConfig(
    vocab_size=260,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
TOOL = Path(sys.executable).parent / "tunepool"
SPARE_SECONDS = 180.0
PIPELINE = """\
name: bench
training: train.jsonl
model: {model}
seed: {seed}
hyperparameters: {{batch_size: 4}}
tunepool: {{training: {{max_steps: {steps}}}}}
preflight: false
"""
JUDGED = """\
evaluate:
  items: {{file: items.jsonl}}
  measures: [{{type: exact_match, name: exact_match}}]
  beside: []
  generation: {{max_tokens: {tokens}}}
gate: gate.yaml
promote: bench@prod
"""
GATE = "assertions:\n  - candidate.exact_match >= 0\n"


class Spent(NamedTuple):
    """Seconds by the clock, and of processors."""

    wall: float
    used: float


class Tuned(Stand):
    """The tuned model and the questions of the pipeline's items, each answered at most `tokens` long."""

    def __init__(self, base: str, *, adapter: Path, rows: list[dict[str, Any]], tokens: int) -> None:
        super().__init__(base, device="cpu", dtype="float32", answers=1, tokens=tokens, alike=True)
        self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval()
        self.speaker = ModelRunner(self.model, self.tokenizer, answer_tokens=tokens, context_tokens=4096)
        self.asked = [row["messages"][:-1] for row in rows]
        self.lengths = [tokens] * len(rows)


def wait_for_spare(home: Path) -> bool:
    """Until the worker says that a program waits for an evaluation; False when it does not, as for want of memory."""
    log, deadline = home / "logs" / "worker.log", time.monotonic() + SPARE_SECONDS
    while time.monotonic() < deadline:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = [line for line in lines if "spare." in line and "an evaluation" in line][-1:]
        if last and "spare.ready" in last[0]:
            return True
        time.sleep(0.2)
    return False


def known_model(home: Path, name: str) -> None:
    """The stack that is to start knows the model `random`; the built-in one it knows by itself."""
    if name == "random":
        folder = make_model_directory(home / "random", RANDOM)
        listed = home / "random.toml"
        listed.write_text(f'[models.random]\nsource = "path"\npath = "{folder}"\n')
        os.environ["TUNEPOOL_MODELS_FILE"] = str(listed)


def prepared(folder: Path, *, model: str, answers: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """The folder of a pipeline whose content nobody has trained on; returns its items."""
    rows = tickets.rows("train")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [dict(rows[number % len(rows)]) for number in range(answers)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    seed = int(time.time()) % 2**31
    text = PIPELINE.format(model=model, seed=seed, steps=steps)
    (folder / "training.yaml").write_text(text)
    (folder / "pipeline.yaml").write_text(text + JUDGED.format(tokens=tokens))
    (folder / "gate.yaml").write_text(GATE)
    return items


def used_below(process: psutil.Process) -> float:
    """Processor seconds of all that has ever run below a process and was waited for, or runs."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])
    return total


def pushed(folder: Path, credentials: Credentials, pipeline: str = "pipeline.yaml") -> tuple[dict[str, Any], Spent]:
    """The document of `tunepool run`, and what the command took by itself."""
    known = {"OPENAI_BASE_URL": credentials.base_url, "OPENAI_API_KEY": str(credentials.api_key)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [TOOL, "--json", "run", pipeline],
        cwd=folder,
        env={**os.environ, **known},
        stdout=subprocess.PIPE,
        check=True,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), Spent(wall, used)


@torch.inference_mode()
def answering(stand: Stand, *, at_once: int, rounds: int) -> dict[str, Spent]:
    """Medians of all answers by each way; rounds take turns, because a machine's speed drifts."""
    spent: dict[str, list[Spent]] = {"ours": [], "generate": []}
    for _ in range(rounds):
        for name, way in (("ours", stand.ours), ("generate", stand.upstream)):
            began, used = time.perf_counter(), time.process_time()
            way(at_once)
            spent[name].append(Spent(time.perf_counter() - began, time.process_time() - used))
    return {name: Spent(*map(statistics.median, zip(*each, strict=True))) for name, each in spent.items()}


def measure(home: Path, work: Path, asked: argparse.Namespace) -> None:
    items = prepared(work, model=asked.model, answers=asked.answers, tokens=asked.tokens, steps=asked.steps)
    known_model(home, asked.model)
    with running_stack(home, port=0) as credentials:
        server_command("models", "fetch", asked.model, home=home)
        base = server_command("models", "path", asked.model, home=home)
        _, trained = pushed(work, credentials, "training.yaml")
        print(f"training             {trained.wall:7.1f} s", flush=True)
        ahead = not asked.cold and wait_for_spare(home)
        print("evaluation           " + ("started ahead" if ahead else "starts cold"), flush=True)
        before = used_below(psutil.Process())
        first, judged = pushed(work, credentials)
        judged = Spent(judged.wall, used_below(psutil.Process()) - before)
        steps = {step["name"]: round(step["seconds"], 2) for step in first["steps"]}
        print(f"evaluate to promote  {judged.wall:7.1f} s  {judged.used:.1f} processor seconds  {json.dumps(steps)}")
        again = [pushed(work, credentials) for _ in range(asked.rounds)]
        assert all(document["steps"][0]["status"] == "skipped" for document, _ in again)
        walls, used = ([getattr(spent, name) for _, spent in again] for name in Spent._fields)
        print(f"unchanged push       {min(walls):7.2f} s  {min(used):.2f} processor seconds, least of {len(again)}")
        adapters.download(credentials.client(), first["model"], out=work / "adapter")
    stand = Tuned(base, adapter=work / "adapter", rows=items, tokens=asked.tokens)
    taken = answering(stand, at_once=asked.at_once, rounds=asked.rounds)
    ours, theirs = taken["ours"], taken["generate"]
    print(f"{asked.answers} answers          {ours.wall:7.1f} s  {ours.used:.1f} processor seconds")
    print(f"beyond the answers   {judged.wall - ours.wall:7.1f} s  {judged.used - ours.used:.1f} processor seconds")
    print(
        f"generate             {theirs.wall:7.1f} s  {theirs.used:.1f} processor seconds: "
        f"{theirs.wall / ours.wall:.2f} times as long, {theirs.used / ours.used:.2f} times the processor seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="of a server; a new one if left out")
    parser.add_argument("--model", default=BUILT_IN, choices=[BUILT_IN, "random"])
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="at most of an answer")
    parser.add_argument("--steps", type=int, default=5, help="of the training")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="nothing is started ahead")
    asked = parser.parse_args()
    os.environ["TUNEPOOL_KEEP_WARM"] = "off" if asked.cold else "imports"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the stack ends with us
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        home = asked.home or Path(folder) / "home"
        home.mkdir(parents=True, exist_ok=True)
        work = Path(folder) / "work"
        work.mkdir()
        measure(home, work, asked)


if __name__ == "__main__":
    main()
