"""What a supervisor watches: a trainer of its own, or its attempt's part of a program that others share."""

from __future__ import annotations

from typing import Protocol

from worker.program.launcher import Exit


class Watched(Protocol):
    """The acts of `launcher.Trainer`, which says what each means."""

    def poll(self) -> int | None: ...

    def ask_to_stop(self) -> None: ...

    def end(self, *, grace_seconds: float) -> Exit: ...

    def abort(self) -> Exit: ...
