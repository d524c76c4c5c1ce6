"""What this host has for trainers, told by a program of the worker: `python -m worker.host.examine`.

It is a process of its own because the launcher imports nothing of the worker, and the API's image has none of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Final

from shared.settings import Settings
from standalone.findings import Finding, fault, ok, warning
from standalone.home import Home
from standalone.up import own_environment

EXAMINE: Final = (sys.executable, "-m", "worker.host.examine")
EXAMINE_SECONDS: Final = 300.0
GIB: Final = 1 << 30


def findings(home: Home, settings: Settings, *, served: bool) -> Iterator[Finding]:
    """The host's devices, each tried by the trainer's own programs, and whom these run as.

    `served`: a worker of this home is at work; it tells of its devices itself.
    """
    if find_spec("torch") is None:
        yield ok("host", "No training stack is installed here: this host serves no devices.")
        return
    try:
        report = _ask(home, settings)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        yield fault("host", f"Its devices cannot be examined: {error}", "Run `make setup` again.")
        return
    yield from read(report, served=served)


def _ask(home: Home, settings: Settings) -> dict[str, Any]:
    """The program's last line. Raises ValueError with its last words where there is none."""
    place = home.path if home.path.is_dir() else None
    done = subprocess.run(
        EXAMINE,
        env=own_environment(home, settings),
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=EXAMINE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300])
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def read(report: dict[str, Any], *, served: bool = False) -> Iterator[Finding]:
    """The findings of a report. Pure."""
    for device in report["devices"]:
        name = f"{device['uuid']} ({device['name']}, {device['total_bytes'] / GIB:.0f} GiB)"
        if device["ailment"]:
            yield fault("host", f"{name}: {device['ailment']}", "Mend that; no job runs there until then.")
        else:
            yield ok("host", f"{name}: {device['found'] or 'not tried'}")
    for words in report["notes"]:
        yield warning("host", words, "Set TUNEPOOL_DEVICES=cpu if that is meant.")
    yield from _isolation(report["isolation"])
    if not served:
        yield warning("host", "No worker runs in this home.", "Start one where devices are to train.")


def _isolation(facts: dict[str, Any]) -> Iterator[Finding]:
    remedy = 'See docs/operations.md, "Keys and secrets", and SECURITY.md.'
    if facts["trainers_are_root"]:
        yield warning("isolation", "Trainers run as root: no user without rights can read this installation.", remedy)
    elif facts["shares_user"]:
        yield warning(
            "isolation",
            f"Trainers run as the worker's own user ({facts['uid']}).",
            "Start the worker as root: it gives trainers a user of nobody's. In containers the walls are theirs.",
        )
    else:
        yield ok("isolation", f"Trainers run as user {facts['uid']}, who has no rights.")
    if facts["noexec"]:
        yield fault(
            "isolation",
            f"Nothing may be executed below {facts['noexec']} (mounted noexec): Triton loads its kernels from there.",
            "Mount it with exec, or move the home: TUNEPOOL_HOME.",
        )
