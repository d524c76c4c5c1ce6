"""Obeys the contract of `worker.train.together` without torch: `python -m tests.fake_cotrainer COTRAINING OUT`.

Each trainee is a fake trainer in a thread of this process, and behaves as the first of its rows says. `kill_self` kills
them all; one that runs out of memory (`fits=0`) has the others stop.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tests import fake_trainer
from tests.fake_trainer import Others

OUT_OF_MEMORY, STOPPED = 4, 5


def main(spec_file: Path, out: Path) -> int:
    cotraining = json.loads(spec_file.read_bytes())
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    codes: list[int] = []
    threads = [
        threading.Thread(target=live, args=(spec, Path(cotraining["outs"][spec["job_id"]]), stopping, codes))
        for spec in cotraining["trainees"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if OUT_OF_MEMORY in codes:
        return OUT_OF_MEMORY
    return STOPPED if set(codes) == {STOPPED} and stopping else 0


def live(spec: dict[str, Any], out: Path, stopping: list[int], codes: list[int]) -> None:
    (out / "end.json").unlink(missing_ok=True)
    try:
        code = fake_trainer.train(spec, out, fake_trainer.behaviour(Path(spec["train_file"])), stopping, Others())
    except Exception:  # noqa: BLE001  # as a crash in Python of one trainee
        code = 1
    codes.append(code)
    if code == OUT_OF_MEMORY:
        stopping.append(0)
    (out / "end.json.tmp").write_text(json.dumps({"code": code, "device_seconds": 1.0}))
    (out / "end.json.tmp").rename(out / "end.json")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
