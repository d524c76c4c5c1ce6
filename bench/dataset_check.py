"""How long the check of a chat file takes, and what memory: `python bench/dataset_check.py [rows]`.

Generates the rows first (100,000 rows, about 60 MB), then prints, in one run, plain json.loads, the check and the
conversion: seconds, ratios, and the peak resident memory of the process.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import header
from shared.rows.check import check
from shared.rows.convert import canonical_lines

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "customer",
    "message",
    "and",
    "answers",
    "with",
    "one",
    "strict",
    "ticket",
    "as",
    "asked",
]


def write_rows(path: Path, *, rows: int, seed: int) -> None:
    dice = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [{"role": "system", "content": "You write tickets."}]
            for _ in range(dice.randint(1, 3)):
                for role in ("user", "assistant"):
                    turns.append({"role": role, "content": " ".join(dice.choices(WORDS, k=dice.randint(8, 26)))})
            turns[-1]["content"] += f" {number}"
            file.write(json.dumps({"messages": turns}) + "\n")


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    print(header(), flush=True)
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows=rows, seed=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        megabytes = path.stat().st_size / 1e6
        with path.open("rb") as file:
            plain = seconds(lambda: [json.loads(line) and None for line in file])
        checked = seconds(lambda: check(chunks(path)))
        converted = seconds(lambda: sum(len(line) for line in canonical_lines(chunks(path))))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows:,} rows, {megabytes:.1f} MB")
    print(f"json.loads       {plain:6.2f} s")
    print(f"check            {checked:6.2f} s  {megabytes / checked:6.1f} MB/s  {checked / plain:4.1f}x json.loads")
    print(
        f"canonical_lines  {converted:6.2f} s  {megabytes / converted:6.1f} MB/s  {converted / plain:4.1f}x json.loads"
    )
    print(f"peak memory      {peak:6.0f} MiB (start {before:.0f} MiB)")


if __name__ == "__main__":
    main()
