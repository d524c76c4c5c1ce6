"""The time that a chat template may take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from shared.errors import Invalid
from worker.train.template_faults import not_exact, template_unusable
from worker.train.time_limit import TimeIsUp, time_limit

Rendered = TypeVar("Rendered")
TIMES: Final = 3  # that a row is tried whose template writes the time


def steadily(read: Callable[[Any], Rendered], record: Any) -> Rendered:
    """What `read` makes of a row by comparing renderings: again where the minute may have changed between two."""
    for _ in range(TIMES - 1):
        try:
            return read(record)
        except Invalid as error:
            if error.code != not_exact().code:
                raise
    return read(record)


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
