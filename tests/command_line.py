"""The `tunepool` command without a process of its own: its start is most of the processor time of a short command.

Where a process is what a test is about (an exit code, a signal, a terminal's width), the test starts one.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tunepool.main import app


def run_here(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the program's entry point does with these words, in the folder `home`, with no other environment."""
    out, err = io.StringIO(), io.StringIO()
    known = {"PATH": "/usr/bin:/bin", "TUNEPOOL_HOME": str(home), "COLUMNS": "200", **environment}
    with (
        mock.patch.dict(os.environ, known, clear=True),
        mock.patch.object(sys, "argv", ["tunepool", *words]),
        contextlib.chdir(home),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
