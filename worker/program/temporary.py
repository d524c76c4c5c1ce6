"""Where a program puts its temporary files: below its attempt's folder, so that they go when that goes.

Killed programs leave folders of multiprocessing, torchrun and inductor behind; in the system's own folder they would
stay for ever.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from worker.program.processes import Tag

_SOCKET_BYTES: Final = 107  # of a unix socket's path (unix(7))
# What libraries put below it: a folder of multiprocessing or of torch_shm_manager, and a socket in that.
_BELOW_BYTES: Final = 40


def folder(scratch: Path, tag: Tag) -> Path:
    """Below `scratch`; where sockets would get too long a path there, a short name in the system's folder. Pure."""
    own = scratch / "tmp"
    if len(os.fsencode(own)) + _BELOW_BYTES <= _SOCKET_BYTES:
        return own
    attempt = hashlib.sha256(str(tag).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"{_prefix(tag.home)}{attempt}"


def make(place: Path, *, uid: int | None) -> None:
    """Make the folder for the user `uid`, who alone may enter."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    if uid is not None:
        os.chown(place, uid, uid)


def remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


def sweep(home: Path) -> None:
    """Remove what earlier workers of this home have left in the system's folder."""
    for left in Path(tempfile.gettempdir()).glob(f"{_prefix(str(home))}*"):
        remove(left)


def _prefix(home: str) -> str:
    return f"tunepool-{hashlib.sha256(home.encode()).hexdigest()[:8]}-"
