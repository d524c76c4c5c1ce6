"""How many validation rows the ranks of a host look at together, written down beside the events.

A rank whose memory runs out cannot try again by itself: the others wait for it in the middle of a pass. So it writes
down that half as many will do and ends, its launcher ends the others and starts all anew, and they go on from the last
checkpoint. The rows of a training pass stay as they are.
"""

from __future__ import annotations

from pathlib import Path

_NAME = "evaluation_rows"


class EvaluationTooLarge(Exception):
    """No error yet: the ranks can go on, with `fitting` validation rows at a time."""

    def __init__(self, *, fitting: int) -> None:
        super().__init__(fitting)
        self.fitting = fitting


def read(out: Path) -> int | None:
    """What was written down, None when there was no need."""
    file = out / _NAME
    return int(file.read_text(encoding="ascii")) if file.exists() else None


def write(out: Path, rows: int) -> None:
    """Write down `rows`; several ranks may do so at once."""
    (out / _NAME).write_text(str(rows), encoding="ascii")
