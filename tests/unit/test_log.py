from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shared.settings import trainer_environment

CODE = """
import structlog
from shared import log
from shared.settings import Settings

log.configure(Settings())
for _ in range(1000):
    structlog.get_logger().error("part.away", error="x" * 100)
print("answered")
"""


def test_a_log_on_a_full_disk_is_dropped_and_what_was_to_be_done_is_done() -> None:
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(
            [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=full, env=trainer_environment(), check=False
        ).stdout

    assert said == b"answered\n"
