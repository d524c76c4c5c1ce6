"""Some rows of a large file, from places spread evenly over it: what they say is known long before all are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shared.lease.values import FileRef
from shared.rows.cells import RowRefused
from shared.rows.convert import canonical_lines
from shared.rows.lines import FileRefused
from shared.store.storage import Store
from worker.program.workdir import Interrupt

# The rows of less are read in about the time that a second program takes to start.
SAMPLED_FROM_BYTES: Final = 16 * 1024 * 1024
PIECES: Final = 16
PIECE_BYTES: Final = 64 * 1024


def stage_sample(store: Store, file: FileRef, target: Path, *, interrupt: Interrupt) -> bool:
    """Bring some rows here as canonical JSONL. False: the file is small, or no line of it is whole in a piece.

    The bytes are parts of a file whose hash nobody has seen here. So its rows are checked anew, and a row that breaks
    a rule means that there is no sample: the reading of the whole file says what is wrong.

    Raises Unavailable, NotFound, and what `interrupt` raises.
    """
    size = store.size(file.key)
    if size < SAMPLED_FROM_BYTES:
        return False
    try:
        with target.open("wb") as sink:
            sink.writelines(canonical_lines(pieces(store, file.key, size=size, interrupt=interrupt)))
    except (RowRefused, FileRefused):
        return False
    return target.stat().st_size > 0


def pieces(
    store: Store, key: str, *, size: int, interrupt: Interrupt, count: int = PIECES, length: int = PIECE_BYTES
) -> Iterator[bytes]:
    """The whole lines in `count` parts of an object of `size` bytes, each of `length` bytes before it is trimmed."""
    step = max(length, math.ceil(size / count))
    for start in range(0, size, step):
        interrupt()
        part = store.part(key, start, min(size, start + length))
        first = 0 if start == 0 else part.find(b"\n") + 1
        last = part.rfind(b"\n") + 1
        if (start == 0 or first) and first < last:
            yield part[first:last]
