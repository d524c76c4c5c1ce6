"""What a pipeline costs beside its training and its answers: `python bench/pipeline.py [--answers 200]`.

Runs the demo's task as `tunepool run` on a stack of its own (or the one of `--home` that runs already), a few steps
long: first the whole pipeline, then the same push again. Prints the wall and processor seconds of the second, and what
evaluate, gate and promote took beyond the answers themselves, which the same code gives in this process, beside
transformers' own batched `generate` on the same model and adapter. The built-in model must be in the home's cache, or
is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import PeftModel
from tunepool import adapters
from tunepool.connection import Credentials

from bench.evaluation import Stand
from examples import tickets
from examples.stack import running_stack, server_command
from worker.train.answering import Speaker

MODEL = "smollm2-135m-instruct"
TOOL = Path(sys.executable).parent / "tunepool"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PIPELINE = """\
name: bench
training: train.jsonl
model: {model}
seed: {seed}
tunepool: {{training: {{max_steps: {steps}}}}}
preflight: false
evaluate:
  items: {{file: items.jsonl}}
  measures: [{{type: exact_match, name: exact_match}}]
  beside: []
  generation: {{max_tokens: {tokens}}}
gate: gate.yaml
promote: bench@prod
"""
GATE = "assertions:\n  - candidate.exact_match >= 0\n"


class Tuned(Stand):
    """The tuned model and the questions of the pipeline's items, each answered at most `tokens` long."""

    def __init__(self, base: str, *, adapter: Path, rows: list[dict[str, Any]], tokens: int) -> None:
        super().__init__(base, device="cpu", dtype="float32", answers=1, tokens=tokens, alike=True)
        self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval()
        self.speaker = Speaker(self.model, self.tokenizer, answer_tokens=tokens, context_tokens=4096)
        self.asked = [row["messages"][:-1] for row in rows]
        self.lengths = [tokens] * len(rows)


def header() -> str:
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in known.splitlines())}
    words = set(lines.get("flags", "").split())
    flags = " ".join(flag for flag in FLAGS if flag in words) or "none of " + " ".join(FLAGS)
    load = os.getloadavg()[0]
    return f"{lines.get('model name', platform.machine())}, {os.cpu_count()} cores, {flags}, load {load:.1f}"


def prepared(folder: Path, *, answers: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """The folder of a pipeline whose content nobody has trained on; returns its items."""
    rows = tickets.rows("train")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [dict(rows[number % len(rows)]) for number in range(answers)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    seed = int(time.time()) % 2**31
    text = PIPELINE.format(model=MODEL, seed=seed, steps=steps, tokens=tokens)
    (folder / "pipeline.yaml").write_text(text)
    (folder / "gate.yaml").write_text(GATE)
    return items


def pushed(folder: Path, credentials: Credentials) -> tuple[dict[str, Any], float, float]:
    """(the document of `tunepool run`, wall seconds, processor seconds of the command)."""
    known = {"OPENAI_BASE_URL": credentials.base_url, "OPENAI_API_KEY": str(credentials.api_key)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [TOOL, "--json", "run", "pipeline.yaml"],
        cwd=folder,
        env={**os.environ, **known},
        stdout=subprocess.PIPE,
        check=True,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), wall, used


@torch.inference_mode()
def answering(stand: Stand, *, at_once: int, rounds: int) -> dict[str, float]:
    """Median seconds of all answers by each way; rounds take turns, because a machine's speed drifts."""
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    for _ in range(rounds):
        for name, way in (("ours", stand.ours), ("generate", stand.upstream)):
            began = time.perf_counter()
            way(at_once)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(home: Path, work: Path, asked: argparse.Namespace) -> None:
    items = prepared(work, answers=asked.answers, tokens=asked.tokens, steps=asked.steps)
    with running_stack(home, port=0) as credentials:
        server_command("models", "fetch", MODEL, home=home)
        base = server_command("models", "path", MODEL, home=home)
        first, whole, _ = pushed(work, credentials)
        again = [pushed(work, credentials) for _ in range(asked.rounds)]
        adapters.download(credentials.client(), first["model"], out=work / "adapter")
    steps = {step["name"]: step["seconds"] for step in first["steps"]}
    print(
        f"whole pipeline       {whole:7.1f} s  {json.dumps({name: round(taken, 1) for name, taken in steps.items()})}"
    )
    assert all(document["steps"][0]["status"] == "skipped" for document, _, _ in again)
    walls, used = ([run[place] for run in again] for place in (1, 2))
    print(f"unchanged push       {min(walls):7.2f} s  least of {len(walls)}; {min(used):.2f} processor seconds")
    stand = Tuned(base, adapter=work / "adapter", rows=items, tokens=asked.tokens)
    taken = answering(stand, at_once=asked.at_once, rounds=asked.rounds)
    judged = sum(steps[name] for name in ("evaluate", "gate", "promote"))
    beyond = judged - taken["ours"]
    print(f"evaluate to promote  {judged:7.1f} s  {beyond:.1f} s beyond the answers ({taken['ours']:.1f} s)")
    rates = {name: asked.answers / each for name, each in taken.items()}
    print(f"answers a second     {rates['ours']:7.2f}    generate {rates['generate']:.2f}: "
          f"{rates['ours'] / rates['generate']:.2f} times as many")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="of a server; a new one if left out")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="at most of an answer")
    parser.add_argument("--steps", type=int, default=5, help="of the training")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the stack ends with us
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        home = asked.home or Path(folder) / "home"
        work = Path(folder) / "work"
        work.mkdir()
        measure(home, work, asked)


if __name__ == "__main__":
    main()
