"""`python -m worker.host.examine`: what this host has for trainers, as a line of JSON for `tunepool-server doctor`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import log
from shared.operating.secrecy import hide_secrets
from shared.operating.trainer_user import own_uid
from shared.settings import Settings
from worker.host import nvml
from worker.host.devices import NoSuchDevice, discover, without_driver
from worker.host.found_device import FoundDevice
from worker.host.probing import Outcome, too_full, try_device


def report(settings: Settings) -> dict[str, Any]:
    """Devices with what is wrong with them, remarks on what is missing, and whom trainers run as."""
    notes: list[str] = []
    try:
        devices = discover(settings)
    except NoSuchDevice as error:
        devices = ()
        notes.append(str(error))
    uid = own_uid(settings)
    return {
        "devices": [_device(device, settings, uid=uid) for device in devices],
        "notes": [*notes, *unused(devices, cards=without_driver())],
        "isolation": isolation(settings, uid=uid),
    }


def unused(devices: Sequence[FoundDevice], *, cards: int) -> list[str]:
    """A remark where this host has NVIDIA GPUs and none of its devices is one. `cards`: how many are in its slots."""
    if not cards or any(device.kind == "cuda" for device in devices):
        return []
    return [f"{cards} NVIDIA GPUs are in this host and no driver serves them, so it trains on its CPU."]


def _device(device: FoundDevice, settings: Settings, *, uid: int | None) -> dict[str, Any]:
    outcome = _tried(device, settings, uid=uid)
    return {
        "uuid": device.uuid,
        "kind": device.kind,
        "name": device.name,
        "total_bytes": device.total_bytes,
        "ailment": device.ailment or outcome.ailment,
        "found": outcome.summary,
    }


def _tried(device: FoundDevice, settings: Settings, *, uid: int | None) -> Outcome:
    """What a probe finds; none on a device that is ailing already, or so full that a probe might end a job there."""
    if not device.healthy:
        return Outcome(None, "")
    if too_full(device):
        return Outcome(None, "in use, so it was not tried; its worker did before its first job")
    driver = nvml.driver() if device.kind == "cuda" else None
    return try_device(device, settings=settings, uid=uid, driver=driver)


def isolation(settings: Settings, *, uid: int | None) -> dict[str, Any]:
    """Whom trainers run as (None: us), and whether the kernel runs what they write below the home."""
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
