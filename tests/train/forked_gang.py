"""`python -m worker.train.gang` whose ranks are forked: the training stack is imported once instead of three times.

Everything is the launcher's own but one call of upstream's, the start of a rank's program. The ranks are forked before
the launcher has a thread, and wait for their arguments and environment; each is a child of the launcher in a session of
its own, as a started one is. Two starts of the ranks are made ready: those that the launcher starts again are there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from worker.train import gang

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IMPORTED = "worker.train.__main__"


class ForkedRank:
    """A process that has imported the training stack and waits for its work; to upstream a `subprocess.Popen`."""

    def __init__(self, others: Sequence[ForkedRank]) -> None:
        self._ours, theirs = socket.socketpair()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for channel in (self._ours, *[other._ours for other in others]):
                channel.close()
            _wait_for_work(theirs)
        theirs.close()
        assert self._ours.recv(1)  # it is in its own session, and can be killed as one

    def begin(self, argv: Sequence[str], environment: dict[str, str]) -> ForkedRank:
        self._ours.sendall(json.dumps([list(argv), environment]).encode())
        self._ours.close()
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code


def _wait_for_work(channel: socket.socket) -> NoReturn:
    """The whole life of a rank. Without work, and when the launcher dies, it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    channel.sendall(b".")
    with channel, channel.makefile("rb") as sent:
        work = sent.read()
    if not work:
        os._exit(0)
    argv, environment = json.loads(work)
    os.environ.clear()
    os.environ.update(environment)
    code = _exit_code_of(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code_of(argv: list[str]) -> int:
    """Run `[PYTHON, "-u", "-m", MODULE, ...]` here, as the interpreter would."""
    assert argv[1:3] == ["-u", "-m"], argv
    sys.argv = argv[3:]
    try:
        runpy.run_module(argv[3], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001  # as the interpreter, whatever it is
        traceback.print_exc()
        return 1
    return 0


def _ready(arguments: Sequence[str]) -> list[ForkedRank]:
    option = "--nproc-per-node="
    (ranks,) = [int(argument.removeprefix(option)) for argument in arguments if argument.startswith(option)]
    ready: list[ForkedRank] = []
    for _ in range(2 * ranks):
        ready.append(ForkedRank(ready))
    return ready


if __name__ == "__main__":
    importlib.import_module(_IMPORTED)
    del sys.modules[_IMPORTED]  # each rank runs it anew; what it has imported stays
    light_start.end()
    ready = _ready(sys.argv[1:])

    def take(_handler: SubprocessHandler, argv: Sequence[str], environment: dict[str, str]) -> Any:
        return ready.pop(0).begin(argv, environment)

    SubprocessHandler._popen = take  # type: ignore[method-assign]  # this process has no other purpose
    sys.exit(gang.main(sys.argv[1:]))
