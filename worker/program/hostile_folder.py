"""The folder that a program on strangers' data writes. Nothing in it is trusted: no name, no link, no size.

A supervisor may read what the program may not. So whatever it reads, uploads, touches or removes below `OUT` comes from
here. Each folder is opened by descriptor, no link is followed, and only plain files count that have one name and
belong to the program's user. Nothing waits for a FIFO, a socket or a device. `OUT` itself lies where the program cannot
put another thing in its place, and its owner is the program's user.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from shared.errors import TunepoolError

_LOOK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ENTER: Final = _LOOK | os.O_DIRECTORY
# Product files are named by libraries (`model-00001-of-00002.safetensors`). A stranger's own names never travel on.
_NAME: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+-]{1,128}")


class Refused(TunepoolError):
    """A program left something else than plain files of its own where its output is expected."""

    code = "program_output_refused"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a folder of output may hold. `bytes` None: as much as its file system is large."""

    files: int = 10_000
    depth: int = 8
    bytes: int | None = None


USUAL: Final = Bounds()


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A plain file below a folder: its relative name, and its bytes when it was looked at."""

    name: str
    bytes: int


def checked(name: str) -> str:
    """`name`, a relative path of harmless parts. Raises Refused."""
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise Refused(f"{name[:200]!r} is no name for a file of a program's output.")
    return name


def opened(out: Path, name: str) -> BinaryIO:
    """The plain file `name` below `out`, to be closed. Raises Refused, FileNotFoundError."""
    above, last = str(PurePosixPath(name).parent), PurePosixPath(checked(name)).name
    with _entered(out) as (ground, owner), _below(ground, above) as folder:
        return _plain(folder, last, owner=owner)


def read(out: Path, name: str, *, most: int) -> bytes:
    """What the file `name` below `out` holds, at most `most` bytes. Raises Refused, FileNotFoundError."""
    with opened(out, name) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise Refused(f"'{name}' of a program's output has more than {most:,} bytes.")
    return content


def holds(out: Path, name: str) -> bool:
    """Whether `name` below `out` is a plain file of the program's own."""
    try:
        opened(out, name).close()
    except (OSError, Refused):
        return False
    return True


def files(out: Path, name: str, *, bounds: Bounds = USUAL) -> list[PlainFile]:
    """Every file of the folder `name` below `out`, sorted. Raises Refused, FileNotFoundError."""
    with _entered(out) as (ground, owner), _below(ground, checked(name)) as folder:
        disk = os.fstatvfs(folder)
        most = bounds.bytes if bounds.bytes is not None else disk.f_blocks * disk.f_frsize
        listed: list[PlainFile] = []
        total = 0
        for file in _walk(folder, "", owner=owner, depth=bounds.depth):
            total += file.bytes
            listed.append(file)
            if len(listed) > bounds.files or total > most:
                raise Refused(f"'{name}' of a program's output has more than {bounds.files:,} files or {most:,} bytes.")
    return sorted(listed, key=lambda file: file.name)


def touch(out: Path, name: str) -> None:
    """Make an empty file `name` in `out`; whatever has that name already stays as it is. Raises Refused."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _entered(out) as (ground, _), contextlib.suppress(FileExistsError):
        os.close(os.open(checked(name), flags, 0o644, dir_fd=ground))


def remove(folder: Path) -> None:
    """Remove `folder` with all it holds, however deep, as far as that may be done; links are removed, not followed."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        top = os.open(folder, _ENTER)
        try:
            _flatten(top)
        finally:
            os.close(top)
        folder.rmdir()


@contextlib.contextmanager
def _entered(out: Path) -> Iterator[tuple[int, int]]:
    """`out` as (descriptor, owner). The program cannot put another owner's folder there."""
    ground = _folder(out.name, str(out))
    try:
        yield ground, os.fstat(ground).st_uid
    finally:
        os.close(ground)


@contextlib.contextmanager
def _below(ground: int, name: str) -> Iterator[int]:
    """The folder `name` below `ground`, entered step by step."""
    here = os.dup(ground)
    try:
        for part in PurePosixPath(name).parts:
            inner = _folder(part, part, dir_fd=here)
            os.close(here)
            here = inner
        yield here
    finally:
        os.close(here)


def _folder(shown: str, path: str, *, dir_fd: int | None = None) -> int:
    try:
        return os.open(path, _ENTER, dir_fd=dir_fd)
    except FileNotFoundError:
        raise
    except OSError as error:  # a link (ELOOP), no folder (ENOTDIR), one that may not be entered
        raise Refused(f"'{shown}' of a program's output is no plain folder.") from error


def _plain(folder: int, name: str, *, owner: int) -> BinaryIO:
    # Looked at first: to open a device may do something. Looked at again when open: the name may be another's by then.
    _must_be_plain(os.stat(name, dir_fd=folder, follow_symlinks=False), name, owner=owner)
    try:
        file = os.open(name, _LOOK, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Refused(f"'{name}' of a program's output cannot be opened as a plain file.") from error
    try:
        _must_be_plain(os.fstat(file), name, owner=owner)
    except Refused:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def _must_be_plain(seen: os.stat_result, name: str, *, owner: int) -> None:
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1 or seen.st_uid != owner:
        raise Refused(f"'{name}' of a program's output is no plain file with one name, or is another user's.")


def _walk(folder: int, above: str, *, owner: int, depth: int) -> Iterator[PlainFile]:
    if depth == 0:
        raise Refused("Folders of a program's output lie too deep in each other.")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = checked(entry.name)
            seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(seen.st_mode):
                with _below(folder, name) as inner:
                    yield from _walk(inner, f"{above}{name}/", owner=owner, depth=depth - 1)
                continue
            _must_be_plain(seen, name, owner=owner)
            yield PlainFile(f"{above}{name}", seen.st_size)


def _flatten(top: int) -> None:
    """Empty the folder `top`: what lies in a folder in it moves up first, so that no depth is too much."""
    while folders := _emptied(top):
        for name in folders:
            inner = os.open(name, _ENTER, dir_fd=top)
            try:
                for deeper in _emptied(inner):
                    os.rename(deeper, f"removed-{secrets.token_hex(8)}", src_dir_fd=inner, dst_dir_fd=top)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=top)


def _emptied(folder: int) -> list[str]:
    """Unlink everything in `folder` but folders; returns those."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders
