"""Set-up says how far it is, by what pip says (standalone/installing.py)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from standalone import installing
from standalone.installing import PipProgress, lines


def test_progress_follows_pips_lines(tmp_path: Path) -> None:
    (tmp_path / "pip-26.1.dist-info").mkdir()
    progress = PipProgress(tmp_path)
    told = [str(progress)]

    for line in (
        "Collecting numpy==2.3.5 (from -c constraints.txt (line 7))\n",
        "  Downloading https://example.org/numpy-2.3.5-cp311-manylinux.whl (16.9 MB)\n",
        "Collecting torch==2.13.0 (from -c constraints.txt (line 9))\n",
        "Installing collected packages: numpy, torch, tunepool-server\n",
    ):
        progress.hear(line)
        told.append(str(progress))
    (tmp_path / "numpy-2.3.5.dist-info").mkdir()

    assert told == [
        "found 0; asks for what is needed",
        "found 1; collects numpy==2.3.5",
        "found 1; downloads numpy-2.3.5-cp311-manylinux.whl (16.9 MB)",
        "found 2; collects torch==2.13.0",
        "installs: 0 of 3 packages",
    ]
    assert str(progress) == "installs: 1 of 3 packages", "what was there before does not count"


def test_lines_come_as_they_are_read() -> None:
    heard = [line for line in lines(io.StringIO("one\ntwo\n"), every=60) if line is not None]

    assert heard == ["one\n", "two\n"]


def test_a_failure_shows_what_pip_said_and_keeps_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho ERROR: no such package; exit 3\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))

    code = installing.main(["nothing"])

    assert code == 3
    assert "ERROR: no such package" in capsys.readouterr().out


def test_what_was_installed_is_compiled_but_for_its_tests(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    for place in ("one", "one/tests"):
        (packages / place).mkdir(parents=True)
        (packages / place / "code.py").write_text("x = 1\n")
    (packages / "template.py").write_text("{{ no python }}\n")

    installing.compile_all(packages, installing.Teller())

    compiled = {str(file.relative_to(packages).parent) for file in packages.rglob("*.pyc")}
    assert compiled == {"one/__pycache__"}


def test_a_file_that_pip_had_written_in_part_is_read_whole(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    code = packages / "grown.py"
    code.write_text("x = 1\n")
    written = code.stat()

    with installing.compiling_beside(packages) as compile_more:
        compile_more()
        kept = packages / "__pycache__" / f"grown.{sys.implementation.cache_tag}.pyc"
        while not kept.exists():
            time.sleep(0.01)
        code.write_text("x = 1\ny = 2\n")
        os.utime(code, ns=(written.st_atime_ns, written.st_mtime_ns))  # within the same second
    installing.compile_all(packages, installing.Teller())

    command = [sys.executable, "-c", "import grown; print(grown.y)"]
    assert subprocess.check_output(command, env={"PYTHONPATH": str(packages)}) == b"2\n"


def test_compiling_begins_once_pip_installs(tmp_path: Path) -> None:
    progress = PipProgress(tmp_path)
    begun = [progress.installs]
    for line in ("Collecting numpy==2.3.5\n", "Installing collected packages: numpy, torch\n"):
        progress.hear(line)
        begun.append(progress.installs)

    assert begun == [False, False, True]
