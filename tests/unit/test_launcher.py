"""What a program on strangers' data is started with, asked of the program itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from shared.settings import trainer_environment
from worker.program import launcher, processes
from worker.program.launcher import Exit


def run(tmp_path: Path, code: str, **options: Any) -> Exit:
    """How a program of `code` ends."""
    out = tmp_path / "out"
    out.mkdir()
    program = launcher.start(
        [sys.executable, "-c", code],
        environment=trainer_environment(),
        tag=processes.own_tag(home=tmp_path, job_id="ftjob-1", fence=1),
        out=out,
        log_file=tmp_path / "log",
        **options,
    )
    deadline = time.monotonic() + 60
    while program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ended_by_itself = program.poll() is not None
    ended = program.end(grace_seconds=0)
    assert ended_by_itself, "it still ran after a minute"
    return ended


def test_a_program_that_computes_for_longer_than_it_may_is_ended_by_the_kernel(tmp_path: Path) -> None:
    ended = run(tmp_path, "while True: pass", cpu_seconds=1)

    assert ended.code in {-9, -24}  # KILL at the hard limit, or SIGXCPU
