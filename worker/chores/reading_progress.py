"""How far the reading of a preflight's rows is, by what lies in its folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from shared.contract.events import RowsRead
from shared.contract.preflight_report import RowProgress
from worker.chores.run_program import Checked
from worker.program import hostile_folder
from worker.program.workdir import Workdir

NOTE_SECONDS: Final = 2.0
MOST_BYTES: Final = 1024


class ReadingProgress:
    """A watch that notes now and then how far the work under it is."""

    def __init__(
        self,
        watch: Checked,
        note: Callable[[RowProgress], None],
        *,
        staged_bytes: int,
        rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`staged_bytes`: of the files as they were uploaded; `rows`: of all of them."""
        self._watch, self._note, self._clock = watch, note, clock
        self._staged_bytes, self._rows = max(1, staged_bytes), max(1, rows)
        self._place: Workdir | None = None
        self._looked = -NOTE_SECONDS
        self._noted: RowProgress | None = None

    def at(self, place: Workdir) -> None:
        """From now on the work goes on in `place`."""
        self._place = place

    def check(self) -> None:
        """What the watch does, and a note when something has changed. Raises Stopped."""
        self._watch.check()
        if self._place is None or self._clock() - self._looked < NOTE_SECONDS:
            return
        self._looked = self._clock()
        progress = self.look(self._place)
        if progress != self._noted:
            self._noted = progress
            self._note(progress)

    def look(self, place: Workdir) -> RowProgress:
        """How far the work in `place` is. What a program on strangers' data says of itself is cut to what can be."""
        if not place.spec.exists():
            return RowProgress(stage="staging", percent=self._staged_percent(place), rows_total=self._rows)
        read = min(self._rows, _rows_read(place))
        return RowProgress(stage="reading", percent=100 * read // self._rows, rows_read=read, rows_total=self._rows)

    def _staged_percent(self, place: Workdir) -> int:
        """A file is brought here, and then written again as the trainer reads it: two halves."""
        done = 0
        for file in place.data.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size = file.stat().st_size
                upload_is_gone = file.suffix == ".jsonl" and not file.with_name(f"{file.name}.upload").exists()
                done += 2 * size if upload_is_gone else size
        return min(99, 50 * done // self._staged_bytes)


def _rows_read(place: Workdir) -> int:
    with contextlib.suppress(OSError, hostile_folder.Refused, ValidationError):
        return RowsRead.model_validate_json(hostile_folder.read(place.out, "progress.json", most=MOST_BYTES)).rows
    return 0
