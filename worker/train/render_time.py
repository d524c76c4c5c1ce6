"""The time that a chat template may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from shared.errors import Invalid
from worker.train.template_faults import template_unusable
from worker.train.time_limit import TimeIsUp, time_limit

Rendered = TypeVar("Rendered")


class RenderTime:
    """Lets a template be compiled and run for a while only; one that was too slow `most` times is not tried again."""

    def __init__(self, *, most: int) -> None:
        self._most: Final = most  # or every row of a file would take its time
        self._too_slow = 0

    def limited(self, seconds: float, work: Callable[[], Rendered]) -> Rendered:
        """What `work`, which lets the template be compiled and run, makes within so many seconds. Raises Invalid."""
        if self._too_slow >= self._most:
            raise _slow(seconds)
        try:
            with time_limit(seconds):
                return work()
        except TimeIsUp as error:
            self._too_slow += 1
            raise _slow(seconds) from error


def _slow(seconds: float) -> Invalid:
    return template_unusable(f"takes more than {seconds:g} seconds for one conversation")
