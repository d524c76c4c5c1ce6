"""What stands for the processes of a stack ends, speaks and is read as a process of its own would (tests/forked.py)."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import celery

from shared.settings import child_environment
from tests.forked import PARENT, PROGRAMS, Forked, line_for, run_forked
from tests.patience import patience

# A database that nobody answers for: a janitor waits for it until it is killed.
NOWHERE = {"DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none", "REDIS_URL": "redis://127.0.0.1:1/0"}


def start(log: Path, *words: str) -> Forked:
    line = line_for(["-m", *words], {})
    assert line is not None
    with log.open("wb") as file:
        return line.start(["-m", *words], environment=child_environment(**NOWHERE), log=file.fileno())


def test_a_forked_program_has_its_words_and_its_log_and_its_exit_code_is_heard(tmp_path: Path) -> None:
    ends = start(tmp_path / "ends.log", "celery", "--version")
    fails = start(tmp_path / "fails.log", "celery", "no-such-command")

    assert (ends.wait(patience(60)), fails.wait(patience(60))) == (0, 2)
    assert celery.__version__ in (tmp_path / "ends.log").read_text()
    assert "No such command" in (tmp_path / "fails.log").read_text()
    assert ends.poll() == 0, "it is remembered"


def test_a_forked_program_that_is_killed_says_by_what(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed.log", "worker.janitor")
    assert killed.poll() is None
    killed.kill()

    assert killed.wait(patience(60)) == -signal.SIGKILL
    killed.kill()  # its number may be another's by now: nothing is sent
    assert killed.returncode == -signal.SIGKILL


def test_a_command_is_answered_with_its_code_and_with_both_that_it_has_said(tmp_path: Path) -> None:
    def server(*words: str) -> subprocess.CompletedProcess[str]:
        environment = child_environment(DATABASE_URL="", TUNEPOOL_HOME=str(tmp_path))
        return run_forked(["-m", "standalone.main", *words], environment=environment, seconds=patience(60))

    listed, refused = server("models", "list"), server("models", "path", "gpt-nothing")

    assert (listed.returncode, refused.returncode) == (0, 2)
    assert "smollm2-135m-instruct" in listed.stdout
    assert ("gpt-nothing" in refused.stdout, "gpt-nothing" in refused.stderr) == (False, True)


def test_a_program_is_told_who_its_parent_is() -> None:
    """Else this one would end at once, or outlive whoever waits for it."""
    environment = child_environment(DATABASE_URL="no address")
    alone = run_forked(["-m", "worker.pull", "cpu", "1"], environment=environment, seconds=patience(60))
    kept = run_forked(["-m", "worker.pull", "cpu", PARENT], environment=environment, seconds=patience(60))

    assert alone.returncode == -signal.SIGKILL
    assert kept.returncode == 1, "it came as far as its database"
    assert "ArgumentError" in kept.stderr


def test_programs_of_which_python_is_told_the_same_are_forked_by_one_process() -> None:
    """That they hear it tests/faults/test_clocks.py shows."""
    told = {"PYTHONPATH": "/elsewhere"}
    for program in PROGRAMS:
        assert line_for(["-m", program], {}) is line_for(["-m", program], {"REDIS_URL": "redis://127.0.0.1:1/0"})
        assert line_for(["-m", program], {}) is not line_for(["-m", program], told)
        assert line_for(["-m", program], told) is line_for(["-m", program], told)


def test_a_program_that_is_none_of_those_that_are_imported_is_not_forked() -> None:
    assert line_for(["-m", "tests.hasty_worker"], {}) is None
