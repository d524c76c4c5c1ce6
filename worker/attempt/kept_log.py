"""What an attempt's trainer prints, kept on this host until the store has it: the beginning and the end, bounded.

logs/{job}.{fence}/head, and tail-{offset} for what came later. The folder outlives its supervisor, whose lock on it
the kernel lets go however it ends; the next start finds what no living supervisor holds (`left_behind`). Of those
that could not be sent yet the newest stay, and what a supervisor had only begun to make when it died goes.
Offsets count bytes of the whole log as it is kept: UTF-8 lines, secrets hidden.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.rows.log_lines import LogLines

HEAD_BYTES: Final = 256 * 1024
SEGMENT_BYTES: Final = 256 * 1024
SEGMENTS: Final = 3  # the last one is being filled
MOST_LEFT: Final = 256  # logs of the dead that a host keeps while the store or the database is away: 256 MiB at most
MADE_SECONDS: Final = 60.0  # a living supervisor needs milliseconds; one that is later has no log, and trains on
LIVE_BYTES: Final = 64 * 1024  # the newest, in memory, until they are told
_NAME: Final = re.compile(r"(?P<job>[A-Za-z0-9-]{1,64})\.(?P<fence>[0-9]{1,18})")
_BEING_MADE: Final = ".new"
_BEING_REMOVED: Final = ".gone"
_SEGMENT: Final = re.compile(r"tail-(?P<start>[0-9]{15})")


@dataclass(frozen=True, slots=True)
class NewText:
    """What was printed since: its offset, the text, and the size of the whole log."""

    start: int
    text: str
    size: int


@dataclass(frozen=True, slots=True)
class WholeLog:
    """A finished log as the store gets it. Between `head_bytes` and `tail_from` of it everything is left out."""

    content: bytes
    head_bytes: int
    tail_from: int
    size: int
    tail_at: int  # where in `content` the tail begins


class KeptLog:
    """Written by the thread that reads the trainer's output, read by the supervisor."""

    def __init__(self, logs: Path, job_id: str, fence: int) -> None:
        """Raises OSError."""
        self.folder = logs / f"{job_id}.{fence}"
        # It gets its name with its lock held: a sibling that looks for logs of the dead would take it for one.
        made = logs / f"{job_id}.{fence}{_BEING_MADE}"
        for earlier in (made, self.folder):
            shutil.rmtree(earlier, ignore_errors=True)
        try:
            made.mkdir(parents=True, mode=0o700)
            self._lock = (made / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = (made / "head").open("wb")
            made.rename(self.folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        self._lines = LogLines()
        self._room = HEAD_BYTES
        self._size = self._told = 0
        self._new: list[bytes] = []
        self._new_bytes = 0
        self._guard = threading.Lock()
        self.fault: str | None = None  # what could not be written here

    def write(self, chunk: bytes) -> None:
        """Take in what was printed. Never raises: a full disk costs lines of the log, not the training."""
        self._keep(self._lines.feed(chunk))

    def finish(self) -> None:
        """Nothing more comes."""
        self._keep(self._lines.feed(b"", final=True))

    def _keep(self, lines: Iterator[str]) -> None:
        for line in lines:
            data = line.encode("utf-8", "replace")
            with self._guard:
                self._store(data)
                self._new.append(data)
                self._new_bytes += len(data)
                while self._new_bytes > LIVE_BYTES and len(self._new) > 1:
                    self._new_bytes -= len(self._new.pop(0))
        with self._guard, contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def _store(self, data: bytes) -> None:
        if len(data) > self._room:
            self._turn()
        self._size += len(data)
        self._room -= len(data)
        try:
            self._file.write(data)
        except (OSError, ValueError) as error:
            self.fault = type(error).__name__

    def _turn(self) -> None:
        """The next segment, and the oldest one goes."""
        try:
            self._file.close()
            self._file = (self.folder / f"tail-{self._size:015d}").open("wb")
            self._room = SEGMENT_BYTES
            for old in sorted(self.folder.glob("tail-*"))[:-SEGMENTS]:
                old.unlink()
        except OSError as error:
            self.fault = type(error).__name__
            self._room = 2**62  # what is here stays, and the rest is only told live

    def news(self) -> NewText | None:
        """The lines since the last report, the newest 64 KiB at most; None: there are none."""
        with self._guard:
            if not self._new:
                return None
            data = b"".join(self._new)
            return NewText(self._size - len(data), data.decode("utf-8", "replace"), self._size)

    def forget(self, news: NewText) -> None:
        """`news` are known elsewhere."""
        with self._guard:
            left = self._size - news.size
            kept: list[bytes] = []
            for data in reversed(self._new):
                if left <= 0:
                    break
                kept.append(data)
                left -= len(data)
            self._new = kept[::-1]
            self._new_bytes = sum(map(len, self._new))

    def let_go(self) -> None:
        """Close the files; the folder stays, and whoever comes next may send it."""
        with self._guard, contextlib.suppress(OSError):
            self._file.close()
            os.utime(self.folder)  # a long training's log is as old as its end
        self._lock.close()


@dataclass(frozen=True, slots=True)
class LeftLog:
    """A log on this host that no living supervisor holds; ours alone while the lock is open."""

    folder: Path
    job_id: str
    fence: int


@contextlib.contextmanager
def left_behind(logs: Path) -> Iterator[list[LeftLog]]:
    """The logs that nobody holds; they are held until the end of the `with`."""
    with contextlib.ExitStack() as held:
        left: list[LeftLog] = []
        for folder in _oldest_first(logs):
            match = _NAME.fullmatch(folder.name)
            if folder.name.endswith(_BEING_REMOVED) or _never_made(folder):
                shutil.rmtree(folder, ignore_errors=True)
            elif match is not None and _held(folder, held):
                left.append(LeftLog(folder, match["job"], int(match["fence"])))
        for log_here in left[:-MOST_LEFT]:
            with contextlib.suppress(OSError):
                remove(log_here.folder)
        yield left[-MOST_LEFT:]


def _oldest_first(logs: Path) -> list[Path]:
    aged: list[tuple[float, Path]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in logs.iterdir():
            with contextlib.suppress(OSError):  # a sibling has just removed it
                aged.append((folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(aged)]


def _never_made(folder: Path) -> bool:
    """Whether its supervisor died before the log had its name."""
    with contextlib.suppress(OSError):
        return folder.name.endswith(_BEING_MADE) and time.time() - folder.stat().st_mtime > MADE_SECONDS
    return False


def _held(folder: Path, held: contextlib.ExitStack) -> bool:
    try:
        lock = held.enter_context((folder / "lock").open("r+"))  # whoever removes the folder must not meet a new file
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return folder.is_dir()


def remove(folder: Path) -> None:
    """What is half removed is no log any more: whoever looks next goes on with it. Raises OSError."""
    gone = folder.with_name(folder.name + _BEING_REMOVED)
    folder.rename(gone)
    shutil.rmtree(gone)


def whole(folder: Path) -> WholeLog:
    """What a folder holds, with a line that says what is left out. Raises OSError."""
    head = (folder / "head").read_bytes()
    segments = sorted((int(m["start"]), path) for path in folder.iterdir() if (m := _SEGMENT.fullmatch(path.name)))
    if not segments:
        return WholeLog(head, head_bytes=len(head), tail_from=len(head), size=len(head), tail_at=len(head))
    tail = b"".join(path.read_bytes() for _, path in segments)
    start = segments[0][0]
    gap = start - len(head)
    mark = f"… [{gap:,} bytes of this log are left out here] …\n".encode() if gap > 0 else b""
    return WholeLog(
        head + mark + tail, head_bytes=len(head), tail_from=start, size=start + len(tail), tail_at=len(head + mark)
    )
