from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


HOSTILE_LINE = """
import structlog
from shared import log
from shared.settings import Settings

hostile = "x\\x1b]0;PWNED\\x07\\x9b2J\\u202e\\ud800\\r"
log.configure(Settings())
logger = structlog.get_logger().bind(bound=hostile)
logger.info("client.gone", path=hostile, words=[hostile], named={hostile: hostile}, fault=ValueError(hostile))
try:
    raise ValueError(hostile)
except ValueError:
    logger.exception(hostile)
"""


@pytest.mark.parametrize("json_lines", ["true", "false"])
def test_no_line_of_a_log_gives_orders_to_the_terminal_that_shows_it(json_lines: str) -> None:
    environment = trainer_environment(TUNEPOOL_LOG_JSON=json_lines, PYTHONIOENCODING="utf-8")

    done = subprocess.run([sys.executable, "-c", HOSTILE_LINE], capture_output=True, env=environment, check=True)

    lines = done.stderr.decode("utf-8").splitlines()
    assert len(lines) >= 2
    assert "ValueError" in done.stderr.decode("utf-8")
    assert [line for line in lines if not line.isprintable()] == []
