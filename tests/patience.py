"""How long a test waits on this machine; every wait and every shortened lease of the tests is decided here.

The tests name seconds as a fast machine needs them. This module measures the machine once, at the start of a session,
and multiplies. Workers of xdist are children of the process that measured, and read the result from the environment.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Final

import numpy as np

MEASURED: Final = "TUNEPOOL_TEST_SLOWNESS"
# Seconds of a machine on which the numbers in the tests are ample: eight idle cores and a local SSD.
IMPORTS, PRODUCT, COMMIT = 0.8, 0.02, 0.002
SLOWEST: Final = 5.0
# A wait that passes in full costs its time at every run. So it grows less than one that ends as soon as it may.
SLOWEST_PACE: Final = 3.0
# The suite runs several files at once, and others may come to work here after the measurement.
COMPANY: Final = 2.0


def patience(seconds: float) -> float:
    """How long to wait at most for something that needs less than `seconds` on a fast machine."""
    return seconds * SLOWNESS * COMPANY


def pace(seconds: float) -> float:
    """The length of a step, a lease or a pause that passes in full. Lengths that stand in relation keep it."""
    return seconds * min(SLOWNESS, SLOWEST_PACE)


def lease(seconds: float) -> str:
    """The same as a setting of a process."""
    return f"{pace(seconds):.3f}"


def paced(behaviour: str) -> str:
    """What a fake trainer is told, with steps at the pace of this machine's leases."""
    return re.sub(r"(?<=step_seconds=)[0-9.]+", lambda found: lease(float(found[0])), behaviour)


def slowness() -> float:
    """How many times slower than a fast machine this one is now, from 1 to `SLOWEST`."""
    shares = (_imports() / IMPORTS, _product() / PRODUCT, _commit() / COMMIT)
    return min(SLOWEST, max(1.0, geometric_mean(shares)))


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _imports() -> float:
    """A process starts and imports what most processes of a stack do."""
    program = [sys.executable, "-c", "import celery, numpy, pydantic, sqlalchemy.orm"]
    return _seconds(lambda: subprocess.run(program, check=True))


def _product() -> float:
    """Two matrices of 1024 x 1024 are multiplied in float32."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    return median(_seconds(lambda: matrix @ matrix) for _ in range(5))


def _commit() -> float:
    """A database commits a row, and the disk says that it has it."""
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(Path(folder) / "commits", isolation_level=None)
        database.execute("pragma synchronous = full")
        database.execute("create table rows (number)")
        taken = median(_seconds(lambda: database.execute("insert into rows values (1)")) for _ in range(10))
        database.close()
    return taken


if MEASURED not in os.environ:
    os.environ[MEASURED] = f"{slowness():.2f}"
SLOWNESS: Final = float(os.environ[MEASURED])
