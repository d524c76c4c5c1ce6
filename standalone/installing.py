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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @property
    def installs(self) -> bool:
        """Whether pip has all that it needs, and puts it in its place."""
        return self._to_install > 0

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
    with (
        compiling_beside(packages) as compile_more,
        subprocess.Popen(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in lines(process.stdout, every=PLACE_SECONDS):
            if line is not None:
                printed.append(line)
                progress.hear(line)
            if progress.installs:
                compile_more()
            teller.tell(progress)
    if process.returncode:
        sys.stdout.write("\n" + "".join(printed[-LAST_LINES:]))
        return process.returncode
    compile_all(packages, teller)
    teller.tell("installed\n" if sys.stdout.isatty() else "installed", now=True)
    return 0


@contextmanager
def compiling_beside(packages: Path) -> Iterator[Callable[[], None]]:
    """A call compiles what lies there by now, on a core that pip leaves free, unless the last call still does.

    Bytecode of a file that pip had written in part names another size: Python takes the source instead.
    """
    running: subprocess.Popen[bytes] | None = None

    def compile_more() -> None:
        nonlocal running
        if running is None or running.poll() is not None:
            running = _compiler(packages, processes=1)

    try:
        yield compile_more
    finally:
        if running is not None:
            running.terminate()
            running.wait()


def compile_all(packages: Path, teller: Teller) -> None:
    """Bytecode of what was installed and has none yet, on all cores."""
    with _compiler(packages, processes=0) as process:
        while process.poll() is None:
            teller.tell("compiles what was installed")
            time.sleep(PLACE_SECONDS)


def _compiler(packages: Path, *, processes: int) -> subprocess.Popen[bytes]:
    """What packages test themselves with stays as it is. `processes`: 0 is one for each core.

    As pip does it, a file that does not compile is nobody's fault: some are templates, or for other versions.
    """
    words = ["-q", "-j", str(processes), "-x", r"site-packages/.*/tests?/", str(packages)]
    return subprocess.Popen(
        [sys.executable, "-m", "compileall", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


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
