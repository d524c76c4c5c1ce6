"""Runs `pip install` and shows how far it is: `python standalone/installing.py ARGUMENTS…`. It needs Python alone.

pip says nothing for minutes with --quiet, and hundreds of lines without. Here it is one line: in place on a terminal,
elsewhere one in a few seconds. What pip said last is shown if it fails.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

LINE_SECONDS: Final = 8.0
PLACE_SECONDS: Final = 0.3
LAST_LINES: Final = 30
_SIZE: Final = re.compile(r"\(([\d.]+ [kMG]B)\)")


class PipProgress:
    """What pip's lines tell of its work."""

    def __init__(self, packages: Path) -> None:
        self._packages = packages
        self._had = self._installed()
        self._found: set[str] = set()
        self._now = "asks for what is needed"
        self._to_install = 0

    def hear(self, line: str) -> None:
        words = line.split()
        match words[:2]:
            case ["Collecting", name]:
                self._found.add(name)
                self._now = f"collects {name}"
            case ["Downloading", file]:
                size = _SIZE.search(line)
                self._now = f"downloads {file.rpartition('/')[2]}{f' ({size[1]})' if size else ''}"
            case ["Installing", "collected"]:
                self._to_install = len(line.partition(":")[2].split(","))
            case ["Building", "wheel"] | ["Preparing", _]:
                self._now = "builds what is here"

    def __str__(self) -> str:
        if self._to_install:
            done = min(self._to_install, max(0, self._installed() - self._had))
            return f"installs: {done} of {self._to_install} packages"
        return f"found {len(self._found)}; {self._now}"

    def _installed(self) -> int:
        return sum(1 for entry in os.scandir(self._packages) if entry.name.endswith(".dist-info"))


def main(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *arguments]
    progress, said, began = PipProgress(Path(sysconfig.get_paths()["purelib"])), list[str](), time.monotonic()
    terminal = sys.stdout.isatty()
    pause, shown = PLACE_SECONDS if terminal else LINE_SECONDS, began
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in lines(process.stdout, every=PLACE_SECONDS):
            if line is not None:
                said.append(line)
                progress.hear(line)
            if time.monotonic() - shown >= pause:
                shown = time.monotonic()
                show(f"{shown - began:4.0f} s  {progress}", terminal=terminal)
    if process.returncode:
        sys.stdout.write("\n" + "".join(said[-LAST_LINES:]))
        return process.returncode
    show(f"{time.monotonic() - began:4.0f} s  everything is installed", terminal=terminal)
    sys.stdout.write("\n" if terminal else "")
    return 0


def lines(stream: IO[str] | None, *, every: float) -> Iterator[str | None]:
    """The stream's lines as they come; None each time that none has come for so long."""
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream or ():
            heard.put(line)
        heard.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = heard.get(timeout=every)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def show(words: str, *, terminal: bool) -> None:
    sys.stdout.write(f"\r\x1b[K{words[:100]}" if terminal else f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
