"""Quantise a base model once: `python -m worker.train.prepare_base SPEC OUT` leaves `OUT/prepared/`, a model directory.

What cannot be read back to the last bit is refused, so a job is the same with it and without.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from shared.contract.events import EXIT_DONE
from shared.contract.prepared import MADE, PrepareSpec
from worker.train.base_model import TORCH_DTYPES, four_bit, load_frozen
from worker.train.prepared import TRIED, ModelFindings, fingerprints, load_prepared
from worker.train.row_leak import leak_between_rows
from worker.train.sequence_state import is_tried

# Trainings go first.
NICE: Final = 19


class NotTheSame(Exception):  # a fact, named as one
    """A model that was read back differs from the one that was written."""


def prepare(spec: PrepareSpec, folder: Path) -> None:
    """Write the base of `spec` in 4 bits to `folder`. Raises NotTheSame, and whatever loading raises."""
    base = Path(spec.base_model_path)
    model = load_frozen(
        base, dtype=TORCH_DTYPES[spec.dtype], quantization=four_bit(spec.quantization), device="cpu", place="cpu"
    )
    wanted = fingerprints(model)
    model.save_pretrained(folder)  # before any pass: bitsandbytes rearranges weights in the first one in eval mode
    del model
    back = load_prepared(folder, base=base, dtype=spec.dtype)
    made = fingerprints(back)
    if made != wanted:
        differ = sorted(name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name))
        raise NotTheSame(f"{len(differ)} tensors come back otherwise, the first of them {differ[0]}")
    if is_tried(back):
        tried = ModelFindings(leak_between_rows=leak_between_rows(back))
        (folder / TRIED).write_text(tried.model_dump_json(), encoding="utf-8")


def main(spec_file: Path, out: Path) -> int:
    os.nice(NICE)
    spec = PrepareSpec.model_validate_json(spec_file.read_bytes())
    torch.set_num_threads(spec.cpu_threads)
    unfinished = out / f"{MADE}.tmp"
    prepare(spec, unfinished)
    unfinished.rename(out / MADE)
    return EXIT_DONE


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
