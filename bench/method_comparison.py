"""Full, LoRA, QLoRA, DoRA and QDoRA on one model and one task, side by side: `python -m bench.method_comparison`.

Model and task are the demo's: a customer's message becomes a strict JSON ticket. Every method sees the same rows in the
same order for the same number of steps, through the trainer that jobs run. The table goes to `--out` as Markdown.

Learning rates are each method's own, for one rate for all would measure the rate: adapters 1e-3 (short runs; the demo's
value), every weight a tenth of it ("LoRA Without Regret", 2025: adapters want about ten times the rate of full
fine-tuning). `--rates` tries others.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from bench.machine import header
from bench.training import run
from examples import tickets
from examples.demo import rates
from examples.stack import server_command
from shared.contract.spec import (
    Adapter,
    AttemptSpec,
    DataFacts,
    Evaluation,
    JobSpec,
    MethodName,
    Placement,
    Quantization,
    Queue,
    Supervised,
    Training,
)
from shared.rows.convert import canonical_lines
from shared.settle.catalogue import SMOLLM2
from shared.settle.workload import keeps_copy

RATES: Final[dict[MethodName, float]] = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3, "dora": 1e-3, "qdora": 1e-3}
HEAD: Final = (
    "| method | learning rate | trained parameters | peak memory | tokens/s | validation loss | valid JSON | exact "
    "| product |\n|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Result:
    method: MethodName
    learning_rate: float
    parameters: int
    peak_bytes: int
    tokens_per_second: float
    validation_loss: float
    valid_json: float
    exact: float
    product_bytes: int

    def line(self) -> str:
        """A row of the Markdown table."""
        cells = (
            self.method,
            f"{self.learning_rate:g}",
            f"{self.parameters / 1e6:.2f} M",
            f"{self.peak_bytes / 2**30:.2f} GiB",
            f"{self.tokens_per_second:.0f}",
            f"{self.validation_loss:.4f}",
            f"{self.valid_json:.0%}",
            f"{self.exact:.0%}",
            f"{self.product_bytes / 1e6:.1f} MB",
        )
        return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".tunepool"), help="where the base model is cached")
    parser.add_argument("--rows", type=int, default=tickets.ROWS["train"], help="training rows")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates instead of the method's own")
    parser.add_argument("--out", type=Path, help="write the Markdown table here too")
    arguments = parser.parse_args()
    print(header(), flush=True)
    server_command("models", "fetch", SMOLLM2.ref.name, home=arguments.home)
    base = Path(server_command("models", "path", SMOLLM2.ref.name, home=arguments.home))
    lines = [HEAD]
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder), rows=arguments.rows)
        for method in arguments.methods:
            for rate in arguments.rates or [RATES[method]]:
                out = Path(folder) / f"{method}-{rate:g}"
                lines.append(measure(method, rate, base=base, data=data, out=out).line())
                print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_rows(folder: Path, *, rows: int) -> dict[tickets.Split, Path]:
    """The demo's files as the trainer reads them, the training file cut to `rows`."""
    files = tickets.write(folder)
    for split, file in files.items():
        lines = list(canonical_lines([file.read_bytes()]))
        file.write_bytes(b"".join(lines[:rows] if split == "train" else lines))
    return files


def measure(method: MethodName, rate: float, *, base: Path, data: dict[tickets.Split, Path], out: Path) -> Result:
    """Train, then ask the product."""
    out.mkdir()
    spec_file = out / "spec.json"
    spec_file.write_text(make_spec(method, rate, base=base, data=data).model_dump_json(), encoding="utf-8")
    run("worker.train", str(spec_file), str(out))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    last: dict[str, dict[str, Any]] = {event["type"]: event for event in events}
    product = out / "adapter"
    answers = json.loads(run("bench.recipes.ticket_answers", str(base), str(product), str(data["held_out"])))
    found = rates(answers, "tuned")
    return Result(
        method=method,
        learning_rate=rate,
        parameters=last["started"]["trainable_parameters"],
        peak_bytes=last["finished"]["peak_memory_bytes"],
        tokens_per_second=last["finished"]["trained_tokens"] / last["finished"]["train_seconds"],
        validation_loss=last["validation"]["valid_loss"],
        valid_json=found["valid_json"],
        exact=found["exact"],
        product_bytes=sum(file.stat().st_size for file in product.glob("*.safetensors")),
    )


def make_spec(method: MethodName, rate: float, *, base: Path, data: dict[tickets.Split, Path]) -> AttemptSpec:
    job = JobSpec(
        base_model=SMOLLM2.ref,
        objective=Supervised(),
        data=DataFacts(
            format="chat",
            train_rows=len(data["train"].read_bytes().splitlines()),
            validation_rows=tickets.ROWS["validation"],
        ),
        adapter=Adapter(method=method, r=16, lora_alpha=16, target_modules="all-linear"),
        quantization=Quantization(),
        training=Training(
            learning_rate=rate,
            num_train_epochs=1,
            batch_size=5,
            max_length=512,
            eval=Evaluation(steps=1_000_000),  # at the end of the epoch only
            publish="last",
        ),
        placement=Placement(),
        queue=Queue(),
        seed=7,
    )
    return AttemptSpec(
        job_id="ftjob-bench",
        model_name="ft:bench",
        job=job,
        base_model_path=str(base),
        train_file=str(data["train"]),
        validation_file=str(data["validation"]),
        micro_batch_size=1,
        cpu_threads=os.cpu_count() or 1,
        keep_dequantized=keeps_copy(job, device="cpu", memory=psutil.virtual_memory().total),  # as a worker does
    )


if __name__ == "__main__":
    main()
