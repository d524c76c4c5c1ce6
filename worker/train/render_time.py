"""The time that a chat template may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from worker.train.template_faults import template_unusable
from worker.train.time_limit import TimeIsUp, time_limit


class RenderTime:
    """Lets a template be compiled and run for a while only; one that was too slow `most` times is not tried again."""

    def __init__(self, *, most: int) -> None:
        self._most: Final = most  # or every row of a file would take its time
        self._too_slow = 0

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Let the template be compiled and run for so long. Raises Invalid."""
        slow = template_unusable(f"takes more than {seconds:g} seconds for one conversation")
        if self._too_slow >= self._most:
            raise slow
        try:
            with time_limit(seconds):
                yield
        except TimeIsUp as error:
            self._too_slow += 1
            raise slow from error
