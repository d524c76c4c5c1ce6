"""Whom strangers' rows and templates are worked on as: never root where that can be helped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import structlog

from shared.settings import Settings, trainer_environment

log = structlog.get_logger()

# Belongs to nobody: above the ranges that distributions hand out, below systemd's dynamic users (61184-65519 is theirs
# to use only while a unit runs) and not 65534, which file servers map strangers to.
UNPRIVILEGED_UID: Final = 64998
PROBE_SECONDS: Final = 30.0
# What a program of ours needs before all else: the interpreter, our code, the libraries, the home.
_PROBE: Final = (
    "import os, sys, shared.contract.spec; sys.exit(not all(os.access(p, os.R_OK | os.X_OK) for p in sys.argv[1:]))"
)


def trainer_user(settings: Settings) -> int | None:
    """The uid that programs on strangers' data run as; None: our own.

    As root it is `TUNEPOOL_TRAINER_UID` (0: root itself), else a uid of nobody's, if that can read interpreter, code
    and home. Where it cannot, for instance below a folder that only root may enter, programs run as root, and the log
    says so.
    """
    if os.geteuid() != 0:
        return None
    if settings.trainer_uid is not None:
        return settings.trainer_uid or None
    home = settings.home.resolve()
    settings.cache.mkdir(parents=True, exist_ok=True)
    if _reaches(UNPRIVILEGED_UID, home, settings.cache):
        return UNPRIVILEGED_UID
    log.warning(
        "trainer.runs_as_root",
        reason=f"user {UNPRIVILEGED_UID} cannot read the interpreter, our code, or {home}",
        remedy="install where others may read, or set TUNEPOOL_TRAINER_UID (0 accepts root)",
    )
    return None


def _reaches(uid: int, *folders: Path) -> bool:
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
