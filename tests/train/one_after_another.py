"""Several runs by the same ranks: `python -m tests.train.one_after_another FOLDER/NAME/spec.json OUT` runs all.

Where `FOLDER/NAME/fused` exists, the supervised losses of that run come from TRL's fused head, as on CUDA.
Where `FOLDER/NAME/waits` exists, that run goes no further than two steps before it is asked to stop.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import pytest
import torch

from tests.train.fused_road import take_the_fused_road
from tests.train.tiny import steps_told
from worker.train.__main__ import main
from worker.train.ranks import Ranks
from worker.train.stopping import StopRequest

_asked = StopRequest.__bool__


def run_one(spec: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        if (spec.parent / "fused").exists():
            take_the_fused_road(patch.setattr)
        if (spec.parent / "waits").exists():
            patch.setattr(StopRequest, "__bool__", lambda request: _asked_once_it_waits(request, spec.parent / "out"))
        return main(spec, spec.parent / "out")


def _asked_once_it_waits(request: StopRequest, out: Path) -> bool:
    while steps_told(out) >= 2 and not (out / "stop").exists():
        time.sleep(0.02)
    return _asked(request)


if __name__ == "__main__":
    light_start.end()
    Ranks.leave = lambda _self: None  # type: ignore[method-assign]  # ranks that have parted do not meet again
    specs = sorted(Path(sys.argv[1]).parent.parent.glob("*/spec.json"))
    code = next((code for spec in specs if (code := run_one(spec))), 0)
    torch.distributed.destroy_process_group()
    sys.exit(code)
