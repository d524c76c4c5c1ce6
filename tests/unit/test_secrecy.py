"""No process that holds a credential can be read by another of the same user."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.settings import child_environment
from tests.patience import patience

ROOT = Path(__file__).parents[2]
# Programs on strangers' data: they are started without any credential, and their supervisor reads their tags. And what
# set-up runs before there is any, or a worker without a credential on figures alone.
WITHOUT_SECRETS = {
    "worker/program/unpack.py",
    "standalone/installing.py",
    "standalone/page_parts.py",
    "worker/chores/event_file_program.py",
}
TOLD = "; import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE


def entries() -> list[Path]:
    """Modules of the house that are run by name."""
    found = [
        path
        for package in ("api", "shared", "standalone", "worker")
        for path in (ROOT / package).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    own = [path for path in found if not path.is_relative_to(ROOT / "worker" / "train")]
    return sorted(path for path in own if str(path.relative_to(ROOT)) not in WITHOUT_SECRETS)


@pytest.mark.parametrize("path", [*entries(), ROOT / "worker/app.py", ROOT / "api/app.py"], ids=lambda path: path.name)
def test_every_entry_that_may_hold_a_credential_hides_it(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]

    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert names & {"hide_secrets", "answer_once"}  # the frame of two programs, which hides them first of all


def test_a_program_with_a_librarys_frame_hides_its_secrets_before_it_reads_one() -> None:
    module = ast.parse((ROOT / "worker/chores/library_answer.py").read_text(encoding="utf-8"))
    (frame,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "answer_once"]
    _docstring, first, *_ = frame.body

    assert ast.unparse(first) == "hide_secrets()"


@pytest.mark.parametrize(
    "begun",
    [
        "from shared.operating.secrecy import hide_secrets; hide_secrets()",
        "from api.app import app_from_settings; app_from_settings()",
        "from standalone.main import _settings; _settings(None)",
    ],
)
def test_a_process_that_has_begun_is_closed_to_its_neighbours(begun: str, tmp_path: Path) -> None:
    environment = child_environment(
        TUNEPOOL_HOME=str(tmp_path), DATABASE_URL="postgresql+psycopg://nobody@127.0.0.1:1/x"
    )

    told = subprocess.run(
        [sys.executable, "-c", begun + TOLD],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
        timeout=patience(60),
    )

    assert told.stdout == "0\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
def test_a_neighbour_of_the_same_user_cannot_read_the_environment_of_a_process_that_hides_it() -> None:
    code = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None)\n"
        "os.setgroups([]); os.setgid(65000); os.setuid(65000)\n"
        "libc.prctl(4, int(sys.argv[1]), 0, 0, 0)\n"
        "child = os.fork()\n"
        "if child:\n    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "libc.prctl(4, 1, 0, 0, 0)\n"
        "open(f'/proc/{os.getppid()}/environ', 'rb').read()\n"
    )
    readable = [
        subprocess.run([sys.executable, "-c", code, flag], capture_output=True, check=False).returncode == 0
        for flag in ("1", "0")
    ]

    assert readable == [True, False]
