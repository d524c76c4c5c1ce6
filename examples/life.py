"""Signs of life: an act that takes long says every few seconds what it is at, also where no terminal spins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console

# Ten seconds of silence look like the end of a program; a line takes its time to come.
QUIET_SECONDS: Final = 8.0
LOOK_SECONDS: Final = 0.5


class Voice(Console):
    """A console that knows when it last said something."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock
        self._spoke_at = clock()

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        self._spoke_at = self._clock()

    @property
    def silent_seconds(self) -> float:
        return self._clock() - self._spoke_at


class Pulse:
    """Says how an act stands whenever nothing else has been said for long. On a terminal something moves anyway."""

    def __init__(self, voice: Voice, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._voice, self._clock = voice, clock

    @contextmanager
    def during(self, words: Callable[[], str]) -> Iterator[None]:
        """A beat now and then, from a thread, while the block runs."""
        if self._voice.is_terminal:
            yield
            return
        over, began = threading.Event(), self._clock()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                self.beat(words, began=began)

        thread = threading.Thread(target=watch, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def beat(self, words: Callable[[], str], *, began: float) -> None:
        """One look; a line if it is time for one."""
        if self._voice.silent_seconds >= QUIET_SECONDS:
            self._voice.print(f"… {words()}, {self._clock() - began:.0f} s", markup=False, highlight=False)
