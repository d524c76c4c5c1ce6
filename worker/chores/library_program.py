"""Runs the library of a tracker, or of a hub, in a program of its own: its threads and exit hooks end with it.

Unlike programs on strangers' data it has the network and a secret, so it is no trainer: it is given figures that we
have checked, through its standard input. Its environment holds no credential.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from shared.errors import TunepoolError
from shared.lease.values import Lease
from shared.settings import trainer_environment
from worker.chores.run_program import LeaseWatch
from worker.host.host import Host
from worker.program import processes, workdir
from worker.program.workdir import Workdir

LOOK_SECONDS: Final = 0.2


class LibraryFailed(TunepoolError):
    """The program brought nothing there; the message is for the job's owner."""

    code = "tracker_failed"


def ask(
    host: Host,
    module: str,
    document: dict[str, Any],
    *,
    lease: Lease,
    watch: LeaseWatch,
    seconds: float,
    place: Workdir | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run `python -m module` on a document with a `scratch` folder added. Returns its answer, one JSON object.

    `place`: the folder of this lease, where it has been made before.

    Nothing of the program lives afterwards. Raises Stopped, LibraryFailed.
    """
    place = place or workdir.make(host.work, lease)
    tag = processes.own_tag(home=host.settings.home.resolve(), job_id=lease.id, fence=lease.fence)
    given = json.dumps({**document, "scratch": str(place.out)}).encode()
    try:
        with (
            place.log.open("wb") as words,
            subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env=trainer_environment(
                    **{processes.TAG: str(tag), "HOME": str(place.out), "TMPDIR": str(place.out), **environment}
                ),
                preexec_fn=partial(processes.die_with_parent, os.getpid()),
            ) as process,
        ):
            try:
                printed = _wait(process, given, watch=watch, until=clock() + seconds, clock=clock)
            except BaseException:
                process.kill()
                raise
    finally:
        processes.kill_strays(tag, spared=None)
    return _answer(printed)


def _wait(
    process: subprocess.Popen[bytes], given: bytes, *, watch: LeaseWatch, until: float, clock: Callable[[], float]
) -> bytes:
    rest: bytes | None = given  # for the first call alone: those that follow go on with it
    while True:
        try:
            return process.communicate(rest, timeout=LOOK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            rest = None
            watch.check()
            if clock() > until:
                raise LibraryFailed("It did not take the figures in time.") from None


def _answer(printed: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(printed)
    except ValueError:
        raise LibraryFailed("Its library ended without an answer; see the worker's log.") from None
    if answer.get("error"):
        raise LibraryFailed(str(answer["error"])[:300])
    return dict(answer)
