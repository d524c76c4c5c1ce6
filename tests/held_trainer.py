"""The fake trainer, whose loading a test holds: it ends when the file that GATE names is there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests import fake_trainer

GATE = "TUNEPOOL_TEST_GATE"

if __name__ == "__main__":
    while not Path(os.environ[GATE]).exists():
        time.sleep(0.02)
    sys.exit(fake_trainer.launch(sys.argv[1:]))
