"""Workers, janitors, APIs and short commands, forked from a process that has imported what they import.

To import it takes such a process 3 to 5 s of a slow core, and the rings start hundreds of them; a fork takes 0.02 s.
What is forked has executed nothing of ours: it gets its own environment, log and arguments, then runs the module as
`python -m` does. What Python itself is told in the environment it hears only at a start, so each such environment has a
forking process of its own. That each program starts on its own, with nothing imported before, is shown where
`tunepool-server` is the one that starts it (tests/lifecycle/test_standalone.py, tests/e2e).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).parents[1]
# What may be forked, by the word after `-m`.
PROGRAMS: Final = frozenset(
    {
        "celery",
        "worker.janitor",
        "worker.pull",
        "worker.chores.playground_queue",
        "worker.attempt.dispatcher",
        "worker.attempt.handed_over",
        "api.serve",
        "standalone.main",
        "tests.forked_up",
    }
)
# `worker.app` and `worker.tasks` are missing: they read the environment when they are imported.
IMPORTED: Final = (
    "api.app",
    "api.serve",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.worker.consumer",
    "kombu.transport.redis",
    "standalone.main",
    "worker.attempt.dispatcher",
    "worker.attempt.handed_over",
    "worker.attempt.supervisor",
    "worker.chores.playground_queue",
    "worker.chores.table",
    "worker.host.presence",
    "worker.janitor",
    "worker.pull",
    "worker.ring",
)
READERS: Final = frozenset({"worker.app", "worker.tasks", "huggingface_hub", "torch"})
MESSAGE_BYTES: Final = 1 << 17
PARENT: Final = "PARENT"
ROOM: Final = "x" * 4000  # for the command line that a fork may give itself (tests/forked_up.py)


class Forked(subprocess.Popen[bytes]):
    """A child of the forking process, in the hands of a test: what a test asks of a `Popen` that has no pipes."""

    _child_created = False  # nothing for the destructor to complain of

    def __init__(self, line: Line, arguments: list[str], pid: int) -> None:
        self.args = arguments
        self.pid = pid
        self.returncode: int | Any = None
        self.stdin = self.stdout = self.stderr = None
        self._line = line

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._line.ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:  # until it is asked for, its number is kept
            os.kill(self.pid, sig)


class Line:
    """The tests' end of the line to the forking process, which is started with the first program."""

    def __init__(self, python: Mapping[str, str]) -> None:
        self._python = python  # what Python is told in the environment
        self._lock = threading.Lock()  # some tests start processes from several threads
        self._socket: socket.socket | None = None

    def start(
        self, arguments: list[str], *, environment: dict[str, str], log: int, errors: int | None = None
    ) -> Forked:
        """Fork `python ARGUMENTS` with that environment. What it says is in the file `log`, its errors in `errors`.

        PARENT among the arguments is the number of what forks, which is the parent.
        """
        words = [str(self.pid) if word == PARENT else word for word in arguments]
        files = [log, log if errors is None else errors]
        return Forked(self, words, self.ask({"run": words, "environment": environment}, files))

    @property
    def pid(self) -> int:
        """The parent of whatever is forked."""
        with self._lock:
            if self._socket is None:
                self._socket = self._open()
            return self._server.pid

    def ask(self, request: dict[str, Any], files: list[int] | None = None) -> Any:
        with self._lock:
            if self._socket is None:
                self._socket = self._open()
            socket.send_fds(self._socket, [json.dumps(request).encode()], files or [])
            answer = self._socket.recv(MESSAGE_BYTES)
        assert answer, "the forking process has died"
        return json.loads(answer)

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = [sys.executable, "-m", "tests.forked", str(theirs.fileno()), ROOM]
            self._server = subprocess.Popen(
                program,
                cwd=ROOT,
                env={**os.environ, **self._python},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        return ours

    def close(self) -> None:
        """End the forking process; it goes as soon as the line is cut."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
                self._server.wait()


LINES: Final[dict[frozenset[tuple[str, str]], Line]] = {}
_ONE_AT_A_TIME: Final = threading.Lock()


def line_for(arguments: list[str], environment: Mapping[str, str]) -> Line | None:
    """The line to a process that may fork `python ARGUMENTS`; `environment`: what it gets beside the tests' own."""
    if arguments[0] != "-m" or arguments[1] not in PROGRAMS:
        return None
    python = {name: value for name, value in environment.items() if name.startswith("PYTHON")}
    with _ONE_AT_A_TIME:
        return LINES.setdefault(frozenset(python.items()), Line(python))


def run_forked(
    arguments: list[str], *, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` has of `python ARGUMENTS`; PARENT as for `Line.start`."""
    line = line_for(arguments, {name: value for name, value in environment.items() if os.environ.get(name) != value})
    assert line is not None, "none of the programs that are forked"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = line.start(arguments, environment=environment, log=out.fileno(), errors=errors.fileno())
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), errors.read())


def close_lines() -> None:
    while LINES:
        LINES.popitem()[1].close()


# --- the forking process ---------------------------------------------------------------------------------------------


def serve(line: socket.socket) -> dict[str, Any]:
    """Fork for every request, and say how the forked ended, until the line is cut. In a fork it returns the request.

    What is forked and has not ended by then is killed: the tests that would end it are gone.
    """
    living: set[int] = set()
    while True:
        message, files, _, _ = socket.recv_fds(line, MESSAGE_BYTES, 2)
        if not message:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            sys.exit(0)
        request = json.loads(message)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            living -= {pid}
        else:
            answer = os.fork()
            for number, file in enumerate(files, start=1):
                if answer == 0:
                    os.dup2(file, number)
                os.close(file)
            if answer == 0:
                return dict(request)
            living.add(answer)
        line.sendall(json.dumps(answer).encode())


def become(request: dict[str, Any]) -> NoReturn:
    """Go on as `python -m MODULE WORDS`."""
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    _, module, *words = request["run"]
    sys.argv = [module, *words]
    gc.enable()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def main(line: socket.socket) -> NoReturn:
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    for name in (PROGRAMS - {"celery"}) & sys.modules.keys():
        del sys.modules[name]  # what it imports stays; itself runs as `__main__`
    assert not READERS & sys.modules.keys(), "these read the environment, which a fork has of its own"
    assert threading.active_count() == 1, "a fork has no other threads"
    gc.freeze()
    with line:
        request = serve(line)
    become(request)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(socket.socket(fileno=int(sys.argv[1])))
