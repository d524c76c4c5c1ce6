"""How many rows a preflight's program has read by now, for its supervisor."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared.contract.events import RowsRead

SAY_SECONDS: Final = 0.5


class RowCount:
    """Says in `OUT/progress.json` how many rows are read by now."""

    def __init__(self, out: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._rows, self._written = 0, -SAY_SECONDS

    def add(self, rows: int) -> None:
        """Count rows, and write the count when the last one has stood for a while."""
        self._rows += rows
        if self._clock() - self._written < SAY_SECONDS:
            return
        self._written = self._clock()
        unfinished = self._out / "progress.json.part"
        unfinished.write_text(RowsRead(rows=self._rows).model_dump_json(), encoding="utf-8")
        unfinished.rename(self._out / "progress.json")
