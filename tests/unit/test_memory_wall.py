"""The memory of the host that a program may hold, with all it forks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from shared.contract.events import EXIT_OUT_OF_MEMORY
from shared.settings import trainer_environment
from tests import living
from tests.patience import patience
from worker.program import launcher, memory_wall, processes
from worker.program.launcher import Trainer
from worker.program.memory_wall import SHORT, SLACK, SLACK_BYTES, Allowance, MemoryWall

GIB = 2**30
ROOMY = {"total": 64 * GIB, "available": 32 * GIB}
CROWDED = {"total": 64 * GIB, "available": int(SHORT * 64 * GIB) - 1}


def start(tmp_path: Path, code: str) -> Trainer:
    out = tmp_path / "out"
    out.mkdir()
    return launcher.start(
        [sys.executable, "-c", code],
        environment=trainer_environment(),
        tag=processes.own_tag(home=tmp_path, job_id="ftjob-1", fence=1),
        out=out,
        log_file=tmp_path / "log",
    )


def test_a_trainer_that_keeps_its_own_bound_is_never_ended_whatever_it_holds_beside() -> None:
    allowance = Allowance(share=8 * GIB, most=8 * GIB)

    assert not allowance.exceeded(8 * GIB, **ROOMY)
    assert not allowance.exceeded(int(8 * GIB * SLACK) + SLACK_BYTES, **ROOMY)
    assert allowance.exceeded(int(8 * GIB * SLACK) + SLACK_BYTES + 1, **ROOMY)


def test_what_exceeds_its_share_ends_only_when_the_host_is_short_of_memory() -> None:
    allowance = Allowance(share=8 * GIB)

    assert not allowance.exceeded(60 * GIB, **ROOMY)
    assert not allowance.exceeded(8 * GIB, **CROWDED)
    assert allowance.exceeded(8 * GIB + 1, **CROWDED)


def test_what_a_program_has_forked_counts_and_it_ends_as_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_wall, "SLACK_BYTES", 0)
    forks = "import os, time\nfor _ in range(3): os.fork()\nheld = b'x' * 2**24\ntime.sleep(600)"
    wall = MemoryWall(Allowance(share=0, most=100 * 2**20), memory=lambda: (64 * GIB, 32 * GIB))
    trainer = start(tmp_path, forks)  # eight processes with 16 MiB each
    deadline = time.monotonic() + patience(30)
    while (held := wall.exceeded()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held is not None, "it held 128 MiB for long"

    ended, failed = wall.end(trainer, held)

    assert held > 110 * 2**20
    assert (ended.code, failed.code, failed.peak_memory_bytes) == (EXIT_OUT_OF_MEMORY, "host_oom", held)
    assert not [child for child in living.family(os.getpid()) if "held = b" in " ".join(living.words(child))]


def test_the_kernel_ends_programs_before_anybody_else_when_memory_runs_out(tmp_path: Path) -> None:
    ask = "import time\nwhile open('/proc/self/oom_score_adj').read() != '1000\\n': time.sleep(0.01)\nprint('first')"
    trainer = start(tmp_path, ask)
    deadline = time.monotonic() + patience(30)
    while trainer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)

    assert trainer.end(grace_seconds=0).last_words == "first\n"
