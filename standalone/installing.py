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


class Teller:
    """Says how far it is: in place on a terminal, elsewhere a line in a few seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._pause = PLACE_SECONDS if self._terminal else LINE_SECONDS
        self._began = time.monotonic()
        self._spoke_at = 0.0

    def tell(self, words: object, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._spoke_at < self._pause:
            return
        self._spoke_at = time.monotonic()
        line = f"{self._spoke_at - self._began:4.0f} s  {words}"[:100]
        sys.stdout.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    packages, teller = Path(sysconfig.get_paths()["purelib"]), Teller()
    progress, printed = PipProgress(packages), list[str]()
    teller.tell(progress, now=True)
    # Half of pip's time is the compiling of all that it installs, on one core.
    pip = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--no-compile", *arguments]
    with subprocess.Popen(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in lines(process.stdout, every=PLACE_SECONDS):
            if line is not None:
                printed.append(line)
                progress.hear(line)
            teller.tell(progress)
    if process.returncode:
        sys.stdout.write("\n" + "".join(printed[-LAST_LINES:]))
        return process.returncode
    compile_all(packages, teller)
    teller.tell("installed\n" if sys.stdout.isatty() else "installed", now=True)
    return 0


def compile_all(packages: Path, teller: Teller) -> None:
    """Bytecode of what was installed, on all cores. What packages test themselves with stays as it is.

    As pip does it, a file that does not compile is nobody's fault: some are templates, or for other versions.
    """
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "-x", r"site-packages/.*/tests?/", str(packages)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            teller.tell("compiles what was installed")
            time.sleep(PLACE_SECONDS)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
