"""A stack of real, small children: their order, what happens to those that die, and that none stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from standalone.children import Child, ChildFailed
from standalone.processes import Stack, StopRequested
from tests import living
from tests.lifecycle.stack import ROOT, until
from tests.patience import patience

POLITE = (
    "trap 'echo $0 ended >> order; exit 0' TERM; echo $$ > $0.pid; echo $0 began >> order; while :; do sleep 0.02; done"
)
DEAF = "trap '' TERM; echo $$ > $0.pid; while :; do sleep 0.02; done"


@pytest.fixture
def stack() -> Iterator[Stack]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    made = Stack()
    made.listen()
    yield made
    made.stop()
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(folder: Path, name: str, script: str, *, stop_seconds: float = 5.0, ready_seconds: float = 10.0) -> Child:
    """Ready once it has written its pid, which it does after it has set its traps."""
    return Child(
        name=name,
        argv=["/bin/sh", "-c", script, name],
        log=folder / f"{name}.log",
        cwd=folder,
        ready=lambda: bool(pid_of(folder, name)),
        ready_seconds=ready_seconds,
        stop_seconds=stop_seconds,
    )


def pid_of(folder: Path, name: str) -> int:
    file = folder / f"{name}.pid"
    return int(file.read_text().strip() or 0) if file.exists() else 0


def watch_while(stack: Stack, act: Callable[[], None]) -> None:
    """`watch` in this thread, which alone hears signals, while `act` runs in another; then a signal ends it."""

    def act_and_end() -> None:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as other:
        done = other.submit(act_and_end)
        stack.watch()
        done.result()


def test_children_start_in_order_and_end_in_reverse(stack: Stack, tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        stack.start(shell(tmp_path, name, POLITE))

    stack.stop()

    assert (tmp_path / "order").read_text().splitlines() == [
        *("first began", "second began", "third began"),
        *("third ended", "second ended", "first ended"),
    ]


def test_a_child_that_died_is_started_again_and_the_others_are_left_alone(stack: Stack, tmp_path: Path) -> None:
    for name in ("dying", "steady"):
        stack.start(shell(tmp_path, name, POLITE))
    dead, steady = pid_of(tmp_path, "dying"), pid_of(tmp_path, "steady")

    def kill_and_look() -> None:
        os.kill(dead, signal.SIGKILL)
        until(lambda: pid_of(tmp_path, "dying") not in (0, dead), seconds=10)

    watch_while(stack, kill_and_look)

    assert living.is_alive(pid_of(tmp_path, "dying"))
    assert pid_of(tmp_path, "steady") == steady


def test_a_death_is_logged_with_its_reason_and_pause(stack: Stack, tmp_path: Path) -> None:
    stack.start(shell(tmp_path, "dying", "echo 1 > $0.pid; while [ ! -e may-end ]; do sleep 0.02; done; exit 7"))

    with capture_logs() as told:
        (tmp_path / "may-end").touch()
        watch_while(stack, lambda: until(lambda: bool(told), seconds=10))

    death = told[0]
    assert death["event"] == "child.died"
    assert (death["name"], death["reason"], death["again_in_seconds"]) == ("dying", "exit code 7", 0.5)


def test_a_child_that_will_not_end_is_killed_with_all_it_started(stack: Stack, tmp_path: Path) -> None:
    stack.start(shell(tmp_path, "deaf", f"sleep 600 & echo $! > grandchild; {DEAF}", stop_seconds=0.2))
    grandchild = psutil.Process(int((tmp_path / "grandchild").read_text()))

    stack.stop()

    assert not living.is_alive(pid_of(tmp_path, "deaf"))
    until(lambda: not living.is_alive(grandchild), seconds=5)


def test_a_second_signal_shortens_the_wait_for_the_stubborn(stack: Stack, tmp_path: Path) -> None:
    stack.start(shell(tmp_path, "deaf", DEAF, stop_seconds=patience(60)))
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    stack.stop()

    assert time.monotonic() - began < patience(10)


def test_a_child_that_ends_before_it_is_ready_is_reported_with_its_log(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"(?s)broken did not start.*no such thing"):
        stack.start(shell(tmp_path, "broken", "echo no such thing; exit 1"))


def test_a_program_that_is_missing_is_reported_by_name(stack: Stack, tmp_path: Path) -> None:
    missing = Child(name="api", argv=["/nowhere/python"], log=tmp_path / "log", cwd=tmp_path)

    with pytest.raises(ChildFailed, match=r"api cannot be started: .*nowhere"):
        stack.start(missing)


def test_a_child_that_is_dead_is_not_ready_though_something_answers_in_its_place(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "api.pid").write_text("1")  # as if another server had our port

    with pytest.raises(ChildFailed, match="api did not start"):
        stack.start(
            Child(
                name="api",
                argv=["/bin/sh", "-c", "exit 1"],
                log=tmp_path / "api.log",
                cwd=tmp_path,
                ready=lambda: not time.sleep(0.3),
            )
        )


def test_a_signal_during_a_slow_start_ends_it_at_once(stack: Stack, tmp_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        stack.start(shell(tmp_path, "slow", "sleep 600", ready_seconds=600))


def test_a_signal_of_nohup_is_left_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Stack().listen()

        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_child_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from standalone.children import Child, spawn\n"
        "child = Child(name='c', argv=['sleep', '600'], log=Path('log'), cwd=Path('.'))\n"
        "print(spawn(child).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    until(lambda: not living.is_alive(child), seconds=5, what="the child's death")


def test_a_child_that_takes_its_time_is_named_with_how_long_it_may_take(stack: Stack, tmp_path: Path) -> None:
    stack.start(shell(tmp_path, "quiet", POLITE))
    stack.start(shell(tmp_path, "deaf", DEAF, stop_seconds=2.0))
    told: list[str] = []

    stack.stop(told.append)

    assert [words for words in told if "deaf" in words] == [
        "waits for the deaf, 2 s at the most; a second signal ends it now"
    ]
