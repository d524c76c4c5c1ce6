"""Obeys the contract of `worker.train.preflight` without torch: `python -m tests.fake_examiner SPEC OUT`.

A row has as many tokens as words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shared.contract.events import FileTokens, Rows, TokenReport

NONE = Rows(count=0, rows=[])


def tokens(file: Path) -> FileTokens:
    lengths = [len(line.split()) for line in file.read_text().splitlines()]
    return FileTokens(
        rows=len(lengths),
        tokens=sum(lengths),
        kept_tokens=sum(lengths),
        trained_tokens=sum(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        median_tokens=sorted(lengths)[len(lengths) // 2],
        p95_tokens=max(lengths),
        longest_row=1,
        longest_tokens=max(lengths),
        histogram=[],
        truncated=NONE,
        empty=NONE,
        duplicates=NONE,
        fault_count=0,
        faults=[],
    )


def main(spec_file: Path, out: Path) -> int:
    spec = json.loads(spec_file.read_bytes())
    report = TokenReport(training=tokens(Path(spec["train_file"])), validation=None, leakage=None, preview=[])
    (out / "preflight.json").write_text(report.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
