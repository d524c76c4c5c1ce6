"""Several runs by the same ranks: `python -m tests.train.one_after_another FOLDER/NAME/spec.json OUT` runs all.

Where `FOLDER/fused` exists, supervised losses come from TRL's fused head, as on CUDA.
"""

from __future__ import annotations

import sys
from pathlib import Path

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch

from tests.train.fused_road import take_the_fused_road
from worker.train.__main__ import main
from worker.train.ranks import Ranks

if __name__ == "__main__":
    light_start.end()
    Ranks.leave = lambda _self: None  # type: ignore[method-assign]  # ranks that have parted do not meet again
    folder = Path(sys.argv[1]).parent.parent
    if (folder / "fused").exists():
        take_the_fused_road()
    specs = sorted(folder.glob("*/spec.json"))
    code = next((code for spec in specs if (code := main(spec, spec.parent / "out"))), 0)
    torch.distributed.destroy_process_group()
    sys.exit(code)
