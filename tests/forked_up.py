"""`tunepool-server up` without its start, nor that of its children: `python -m tests.forked_up FOLDER up …`, forked.

To start it and what it starts is 10 s of a slow core, and a dozen tests of it look at something else: how it heals,
ends and goes on. This is forked by the forking process of tests/forked.py, and forks those of its children that are
programs of ours, with what all have imported before. All else is as it is: who is whose child, sessions, signals, logs,
environments, command lines. That it starts on its own the other tests of tests/lifecycle/test_standalone.py show.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from standalone import children, processes
from standalone.children import Child
from tests.forked import PROGRAMS, become

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_ARGUMENTS: Final = slice(45, 47)  # proc(5): arg_start and arg_end, counted from behind the name


def name_it(words: Sequence[str]) -> None:
    """Let the system show these words as our command line."""
    with open("/proc/self/stat", "rb") as file:
        start, end = (int(number) for number in file.read().rpartition(b")")[2].split()[_ARGUMENTS])
    line = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, line, len(line))


def spawn(child: Child) -> subprocess.Popen[bytes]:
    """As `standalone.children.spawn`; a program of ours is forked from here."""
    words = [str(word) for word in child.argv]
    if words[:2] != [sys.executable, "-m"] or words[2] not in PROGRAMS:
        return _spawned(child)
    child.before()
    dies_with_us = children.die_with_parent(child.last_word)
    pid = os.fork()
    if pid == 0:
        _live(lambda: _begin(child, words, dies_with_us))
    return _process(words, pid)


_spawned: Final = children.spawn


def _process(words: list[str], pid: int) -> subprocess.Popen[bytes]:
    """A `Popen` of a child that is there already."""
    made: Any = subprocess.Popen.__new__(subprocess.Popen)
    made.args, made.pid, made.returncode = words, pid, None
    made.stdin = made.stdout = made.stderr = None
    made._child_created, made._waitpid_lock, made._sigint_wait_secs = True, threading.Lock(), 0.25
    return made  # type: ignore[no-any-return]


def _begin(child: Child, words: list[str], dies_with_us: Callable[[], None]) -> NoReturn:
    """What a start would do, and `python -m`."""
    os.setsid()
    dies_with_us()
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, output, output)):
        os.dup2(file, number)
    gc.collect()  # nothing of the parent is left to close a number that is ours by then
    gc.freeze()
    os.closerange(3, 1 << 20)
    os.chdir(child.cwd)
    name_it(words)
    become({"environment": dict(os.environ if child.environment is None else child.environment), "run": words[1:]})


def _live(life: Callable[[], NoReturn]) -> NoReturn:
    """A whole life, down to its exit code; what stands above in our stack is the parent's."""
    code = 1
    try:
        life()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.argv = ["tunepool-server", *sys.argv[2:]]
    name_it(sys.argv)
    processes.spawn = spawn
    from standalone.main import app

    app()
