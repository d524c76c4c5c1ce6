"""Halves the time that a program takes to start: it leaves out parts of the training stack that nobody uses."""

from __future__ import annotations

import gc
import logging
import sys
from typing import Final

# The stack imports them where they are installed, as on a worker for trackers and object stores, and no program uses
# them: a quarter of the start. Trackers are heard of by programs of their own, in worker.chores.
UNUSED: Final = ("boto3", "redis", "wandb")


def begin() -> None:
    """Before the first import of the stack, and only in a process that is nothing but that program.

    The million objects that imports make live to the end: to look through them meanwhile is another third.
    """
    gc.disable()
    # It advises to install a package of kernels, which would repack 4-bit weights (worker/train/base_model.py).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in UNUSED:
        sys.modules[name] = None  # type: ignore[assignment]  # documented: to everybody it is not installed


def end() -> None:
    """Once all is imported."""
    gc.freeze()
    gc.enable()
