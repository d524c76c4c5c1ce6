"""The user that programs on strangers' data run as: never root where that is possible, and one for each program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

import structlog

from shared.settings import Settings, trainer_environment

log = structlog.get_logger()

User = Literal["slot", "shared", "own"]

# They belong to nobody: above the ranges that distributions hand out, below systemd's dynamic users (61184-65519 is
# theirs to use only while a unit runs) and not 65534, which file servers map strangers to.
UNPRIVILEGED_UIDS: Final = range(64000, 65000)
PROBE_SECONDS: Final = 30.0
# What a program of ours needs before all else: the interpreter, our code, the libraries, the home.
_PROBE: Final = (
    "import os, sys, shared.contract.spec; sys.exit(not all(os.access(p, os.R_OK | os.X_OK) for p in sys.argv[1:]))"
)


@dataclass(frozen=True, slots=True)
class TrainerUser:
    """`slot`: a user of nobody's for each program at work. `shared`: one for all of them. `own`: the worker's."""

    kind: User
    uid: int | None = None  # of `shared`


def trainer_user(settings: Settings) -> TrainerUser:
    """Whose user programs on strangers' data have.

    As root it is `TUNEPOOL_TRAINER_UID` (0: root itself), else users of nobody's, if those can read interpreter, code
    and home. Where they cannot, for instance below a folder that only root may enter, programs run as root, and the log
    says so.
    """
    if os.geteuid() != 0:
        return TrainerUser("own")
    if settings.trainer_uid is not None:
        return TrainerUser("shared", settings.trainer_uid) if settings.trainer_uid else TrainerUser("own")
    settings.cache.mkdir(parents=True, exist_ok=True)
    return TrainerUser("slot" if _others_reach(settings.home.resolve(), settings.cache) else "own")


@cache
def _others_reach(home: Path, models: Path) -> bool:
    uid = UNPRIVILEGED_UIDS[0]
    if reaches(uid, home, models):
        return True
    log.warning(
        "trainer.runs_as_root",
        reason=f"user {uid} cannot read the interpreter, our code, or {home}",
        remedy="install where others may read, or set TUNEPOOL_TRAINER_UID (0 accepts root)",
    )
    return False


@cache
def _taken() -> tuple[int, socket.socket | None]:
    """A user of nobody's that no other process of this host has taken; the kernel lets go of it when we end."""
    for uid in UNPRIVILEGED_UIDS:
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0tunepool-uid-{uid}")
        except OSError:
            lock.close()
            continue
        return uid, lock
    raise RuntimeError(f"All users from {UNPRIVILEGED_UIDS[0]} to {UNPRIVILEGED_UIDS[-1]} are at work on this host.")


def own_uid(settings: Settings) -> int | None:
    """The uid of the programs that this process starts, taken for as long as it lives; None: its own."""
    user = trainer_user(settings)
    return _taken()[0] if user.kind == "slot" else user.uid


def reaches(uid: int, *folders: Path) -> bool:
    """Whether a program of this user can read the interpreter, our code and the folders."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, *folders],
            cwd="/",
            env=trainer_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=uid,
            group=uid,
            extra_groups=[],
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
