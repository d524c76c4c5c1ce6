"""Short private folders for Unix sockets. A home may have a long path; a socket's may have 107 characters only."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

PREFIX: Final = "tp-"


def make_socket_dir(note: Path, *, owner: tuple[int, int] | None = None) -> Path:
    """A new folder that only `owner` (uid, gid; None: us) may enter; `note` remembers it.

    What the note named before is removed: whoever was killed could not.
    """
    forget_socket_dir(note)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # mkdtemp makes it 0700 and ours
    if owner is not None:
        os.chown(path, *owner)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(str(path), encoding="utf-8")
    return path


def noted_socket_dir(note: Path) -> Path | None:
    """The folder that the note names, if it is still there."""
    path = Path(note.read_text(encoding="utf-8")) if note.exists() else None
    return path if path is not None and path.name.startswith(PREFIX) and path.is_dir() else None


def forget_socket_dir(note: Path) -> None:
    """Remove the folder that the note names, and the note."""
    path = noted_socket_dir(note)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
    note.unlink(missing_ok=True)
