"""What a program on strangers' data is started with, asked of the program itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import EXIT_OUT_OF_MEMORY
from shared.settings import trainer_environment
from tests import living
from tests.patience import patience
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
    deadline = time.monotonic() + patience(60)
    while program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ended_by_itself = program.poll() is not None
    ended = program.end(grace_seconds=0)
    assert ended_by_itself, "it still ran after a minute"
    return ended


def test_a_program_that_computes_for_longer_than_it_may_is_ended_by_the_kernel(tmp_path: Path) -> None:
    ended = run(tmp_path, "while True: pass", cpu_seconds=1)

    assert ended.code in {-9, -24}  # KILL at the hard limit, or SIGXCPU


def test_a_program_that_native_code_aborts_for_want_of_memory_is_out_of_memory(tmp_path: Path) -> None:
    said = "memory allocation of 49152 bytes failed"
    ended = run(tmp_path, f"import os, sys; print('{said}', file=sys.stderr, flush=True); os.abort()")

    assert (ended.code, ended.last_words.splitlines()[0]) == (EXIT_OUT_OF_MEMORY, said)


def test_a_program_cannot_gain_rights_by_starting_another(tmp_path: Path) -> None:
    ended = run(tmp_path, "print(open('/proc/self/status').read())")

    assert "NoNewPrivs:\t1" in ended.last_words


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler], ids=["default", "ignored", "own"])
def odd_parent(request: pytest.FixtureRequest) -> Iterator[None]:
    """This process treats signals as one of a worker's may: as a child of the pool, under nohup, with handlers."""
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.signal(number, request.param)) for number in numbers]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.usefixtures("odd_parent")
def test_a_program_begins_with_the_same_signals_whoever_starts_it(tmp_path: Path) -> None:
    code = "print(*[line for line in open('/proc/self/status') if line[:6] in ('SigBlk', 'SigIgn')])"
    words = run(tmp_path, code).last_words.split()

    blocked, ignored = int(words[1], 16), int(words[3], 16)
    python_itself = {signal.SIGPIPE, signal.SIGXFSZ}
    ours = signal.valid_signals() - python_itself  # not those that the C library keeps for itself
    assert (blocked, {number for number in ours if ignored >> (number - 1) & 1}) == (0, {signal.SIGINT})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as another user")
def test_the_trainers_user_has_a_bound_of_processes(tmp_path: Path) -> None:
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NPROC))"
    ended = run(tmp_path, code, uid=0)

    assert ended.last_words.strip() == f"({launcher.PROCESSES}, {launcher.PROCESSES})"


def test_a_program_cannot_make_a_file_that_is_larger_than_its_disk(tmp_path: Path) -> None:
    code = "import os; disk = os.statvfs('.'); open('sparse', 'wb').truncate(disk.f_blocks * disk.f_frsize + 1)"

    assert run(tmp_path, code).code != 0
    assert (tmp_path / "out" / "sparse").stat().st_size == 0


def test_a_program_has_a_bound_of_open_files(tmp_path: Path) -> None:
    ended = run(tmp_path, "import resource; print(max(resource.getrlimit(resource.RLIMIT_NOFILE)))")

    assert int(ended.last_words) <= launcher.OPEN_FILES


@pytest.fixture
def adopting() -> Iterator[None]:
    """This process is a supervisor for a while: what its programs abandon becomes its own."""
    processes.adopt_strays()
    yield
    processes._LIBC.prctl(processes._PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.usefixtures("adopting")
def test_what_a_program_leaves_behind_dies_with_it_and_what_was_there_before_does_not(tmp_path: Path) -> None:
    neighbour = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    # Without our tag and in a session of its own, it can be known by its descent alone.
    stray = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    stray += " env={}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"

    left = int(run(tmp_path, stray).last_words)

    assert not living.is_alive(left)
    assert neighbour.poll() is None
    neighbour.kill()
    neighbour.wait()


class _Heard:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.text, self.over = b"", threading.Event()

    def write(self, chunk: bytes) -> None:
        self.text += chunk

    def finish(self) -> None:
        self.over.set()


@pytest.mark.parametrize("when", ["between two lines", "after the end"])
def test_a_sink_that_comes_later_hears_what_was_printed_before(tmp_path: Path, when: str) -> None:
    out, go_on = tmp_path / "out", tmp_path / "go-on"
    out.mkdir()
    code = (
        "import pathlib, time\nprint('before', flush=True)\n"
        f"while not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.01)\nprint('afterwards', flush=True)"
    )
    program = launcher.start(
        [sys.executable, "-c", code],
        environment=trainer_environment(),
        tag=processes.own_tag(home=tmp_path, job_id="ftjob-1", fence=1),
        out=out,
        log_file=tmp_path / "log",
    )
    heard = _Heard()
    deadline = time.monotonic() + patience(60)

    def until(holds: Callable[[], bool]) -> None:
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_bytes() == b"before\n")
    if when == "between two lines":
        program.log_to(heard)
    go_on.touch()
    until(lambda: program.poll() is not None)
    if when == "after the end":
        until(lambda: b"afterwards" in (tmp_path / "log").read_bytes())
        program.log_to(heard)
    program.end(grace_seconds=0)

    until(heard.over.is_set)
    assert heard.text == b"before\nafterwards\n"
