"""How a trainer gets its work: by arguments, or over a socket when it was started ahead."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.contract.handover import ARGUMENT, LINE_BYTES, TAKEN, WAITING, Handover
from worker.train.prepared import HeldModel


def held_by(words: Sequence[str]) -> HeldModel | None:
    """The base model that this process is to hold until it has work; None: no order, or it cannot."""
    return HeldModel.load(Path(words[2])) if words[0] == ARGUMENT and len(words) > 2 else None


def work_of(words: Sequence[str]) -> tuple[Path, Path]:
    """(SPEC, OUT). By the time this is called everything has been imported; then it waits, for as long as it must.

    Raises SystemExit (0) when the socket closes without work.
    """
    if words[0] != ARGUMENT:
        return Path(words[0]), Path(words[1])
    with socket.socket(fileno=int(words[1])) as line:
        line.sendall(WAITING)
        with line.makefile("rb") as lines:
            message = lines.readline(LINE_BYTES)
        if not message.endswith(b"\n"):
            sys.exit(0)
        work = Handover.model_validate_json(message)
        line.sendall(TAKEN)
    return Path(work.spec), Path(work.out)
