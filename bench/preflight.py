"""How long a preflight reads a chat file, and in what memory: `python bench/preflight.py MODEL_FOLDER [rows]`.

MODEL_FOLDER holds a base model's tokenizer; without it, the built-in model's in the home's cache. Generates the rows
first (100,000 rows, about 60 MB), then runs, as the CPU lane does, the answer from a sample, the staging of canonical
rows (without the download) and the program itself in two processes; prints seconds, rows a second beside a single plain
tokenizer call per row in the same run, and the peak memory of the whole process group (PSS: pages that processes share
are counted once).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from obstore.store import LocalStore

from bench.dataset_check import chunks, write_rows
from bench.machine import header
from shared.contract.events import TokenReport
from shared.contract.spec import (
    Adapter,
    DataFacts,
    JobSpec,
    Placement,
    PreflightSpec,
    Quantization,
    Queue,
    Supervised,
    Training,
)
from shared.lease.values import FileRef
from shared.rows.check import Limits, check
from shared.rows.convert import checked_lines
from shared.settings import Settings, trainer_environment
from shared.settle.catalogue import SMOLLM2, local_folder
from shared.store.storage import Store
from worker.chores.sampling import stage_sample

PLAIN = """
import json, sys, time
from itertools import islice
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
with open(sys.argv[2]) as lines:
    rows = [json.loads(line)["messages"] for line in islice(lines, 5000)]
began = time.perf_counter()
for row in rows:
    tokenizer(tokenizer.apply_chat_template(row, tokenize=False), add_special_tokens=False)
print((time.perf_counter() - began) / len(rows))
"""


def spec(model: Path, file: Path, *, rows: int) -> PreflightSpec:
    job = JobSpec(
        base_model=SMOLLM2.ref,
        objective=Supervised(),
        data=DataFacts(format="chat", train_rows=rows),
        adapter=Adapter(),
        quantization=Quantization(),
        training=Training(max_length=2048),
        placement=Placement(),
        queue=Queue(),
        seed=1,
    )
    return PreflightSpec(
        job=job,
        base_model_path=str(model),
        train_file=str(file),
        preview_rows=[1, 2, 3],
        processes=2,
        memory_bytes=2 << 30,
    )


def run(wanted: PreflightSpec, folder: Path) -> tuple[float, float, int]:
    """Seconds and processor seconds of the program from start to exit, and the peak PSS of its group in bytes."""
    (folder / "spec.json").write_text(wanted.model_dump_json(), encoding="utf-8")
    argv = [sys.executable, "-m", "worker.train.preflight", str(folder / "spec.json"), str(folder / "out")]
    environment = trainer_environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    began, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(argv, env=environment)
    while process.poll() is None:
        peak = max(peak, pss(process.pid))
        time.sleep(0.25)
    assert process.returncode == 0, process.returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, processor, peak


def sample(model: Path, raw: Path, folder: Path) -> float:
    """Seconds until the lane has the answer of a sample of `raw`."""
    began = time.perf_counter()
    file = FileRef(id="raw", key=raw.name, bytes=raw.stat().st_size, sha256="", report=None)
    store = Store(LocalStore(prefix=str(raw.parent)))
    staged, place = folder / "sample.jsonl", folder / "sampled"
    if not stage_sample(store, file, staged, interrupt=lambda: None):
        return 0.0
    place.mkdir()
    run(spec(model, staged, rows=1), place)
    return time.perf_counter() - began


def pss(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return total
    return total


def main() -> None:
    here = local_folder(SMOLLM2, cache=Settings().cache)
    model = Path(sys.argv[1]) if len(sys.argv) > 1 and not sys.argv[1].isdigit() else here
    rows = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 100_000
    if not (model / "tokenizer.json").is_file():
        print(f"skipped: no tokenizer in {model}; run `make demo` once, or name a model's folder")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        raw, staged = folder / "raw.jsonl", folder / "train.jsonl"
        write_rows(raw, rows=rows, seed=1)
        began = time.perf_counter()
        report = check(chunks(raw), limits=Limits(file_bytes=raw.stat().st_size))
        checked = time.perf_counter() - began
        began = time.perf_counter()
        with staged.open("wb") as sink:
            sink.writelines(checked_lines(chunks(raw)))
        written = time.perf_counter() - began
        sample_at = sample(model, raw, folder)
        plain = subprocess.run(
            [sys.executable, "-c", PLAIN, str(model), str(staged)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            check=True,
            capture_output=True,
            text=True,
        )
        seconds, processor, peak = run(spec(model, staged, rows=rows), folder)
        found = TokenReport.model_validate_json((folder / "out" / "preflight.json").read_bytes())
    assert report.rows == found.training.rows == rows
    per_row = float(json.loads(plain.stdout))
    print(f"{rows:,} rows, {report.bytes / 1e6:.1f} MB, {found.training.tokens:,} tokens")
    print(header())
    print(f"answer of the sample     {sample_at:6.2f} s (before staging)")
    print(f"check at upload          {checked:6.2f} s (done before, once per file)")
    print(f"staging                  {written:6.2f} s")
    print(
        f"preflight program        {seconds:6.2f} s  {rows / seconds:8,.0f} rows/s  ({processor:.1f} processor seconds)"
    )
    print(f"staging and program      {written + seconds:6.2f} s")
    print(f"plain render + tokenize  {per_row * rows:6.2f} s  {per_row * rows / seconds:8.2f}x the program")
    print(f"peak memory of the group {peak / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main()
