"""`python -m worker.host.examine`: what this host has for trainers, as a line of JSON for `tunepool-server doctor`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from shared import log
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from worker.host.devices import NoSuchDevice, discover
from worker.host.found_device import FoundDevice
from worker.program.trainer_user import trainer_user


def report(settings: Settings) -> dict[str, Any]:
    """Devices with what is wrong with them, remarks on what is missing, and whom trainers run as."""
    notes: list[str] = []
    try:
        devices = discover(settings)
    except NoSuchDevice as error:
        devices = ()
        notes.append(str(error))
    return {
        "devices": [_device(device, found=device.kind) for device in devices],
        "notes": notes,
        "isolation": isolation(settings),
    }


def _device(device: FoundDevice, *, found: str) -> dict[str, Any]:
    return {
        "uuid": device.uuid,
        "kind": device.kind,
        "name": device.name,
        "total_bytes": device.total_bytes,
        "ailment": device.ailment,
        "found": found,
    }


def isolation(settings: Settings) -> dict[str, Any]:
    """Whom trainers run as, and whether the kernel runs what they write below the home."""
    uid = trainer_user(settings)
    return {
        "uid": os.geteuid() if uid is None else uid,
        "trainers_are_root": os.geteuid() == 0 and uid is None,
        "shares_user": uid is None,
        "noexec": noexec(settings.home.resolve()),
    }


def noexec(home: Path) -> str:
    """The home, if its file system runs no programs; else the empty string."""
    place = next(folder for folder in (home, *home.parents) if folder.is_dir())
    return str(place) if os.statvfs(place).f_flag & os.ST_NOEXEC else ""


def main(settings: Settings) -> int:
    hide_secrets()
    log.configure(settings)
    sys.stdout.write(json.dumps(report(settings)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Settings()))
