"""The worker's pulse: a file that its main process touches every round, for probes that know no broker and no database.

`python -m worker.pulse` exits 0 while the worker of this home is alive. It is alive without Postgres and without Redis
too: a probe that failed then would have trainings killed for an outage they survive.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from shared.operating.secrecy import hide_secrets
from shared.settings import Settings


def beat(home: Path) -> None:
    """Say that the main process still turns."""
    _file(home).touch()


def silence(home: Path, *, now: float) -> float:
    """Seconds since the last beat, by the file system's clock; infinite before the first."""
    try:
        return now - _file(home).stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _file(home: Path) -> Path:
    return home / "worker.pulse"


def main(settings: Settings) -> int:
    """0: alive. 1: silent for a whole lease, when its jobs are being taken back."""
    hide_secrets()
    quiet = silence(settings.home.resolve(), now=time.time())
    if quiet <= settings.lease_seconds:
        return 0
    print(f"The worker of {settings.home.resolve()} has been silent for {quiet:.0f} s.", file=sys.stderr)  # noqa: T201  # for the prober's log
    return 1


if __name__ == "__main__":
    sys.exit(main(Settings()))
