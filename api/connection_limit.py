"""Limits the connections of a process, in all and for each address, so that no address shuts the others out."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Final, Protocol

MOST: Final = 8192
# Descriptors for all else: database, store, files, logs.
RESERVED: Final = 256


class Connection(Protocol):
    """What the limit asks of a connection."""

    def leave(self) -> None:
        """End at once: nothing has been asked yet, or not whole."""


class ConnectionLimit:
    """The connections of one process. Those that have asked nothing whole are told to leave first, oldest first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._of: Counter[str] = Counter()
        self._idle: dict[str, dict[Connection, None]] = {}

    @property
    def held(self) -> int:
        """How many there are now."""
        return self._of.total()

    def enter(self, connection: Connection, address: str) -> bool:
        """Whether there is room for it; room may be made."""
        if self._of[address] >= self.most // 2 and not self._make_room(address):
            return False
        if self.held >= self.most and not self._make_room(self._most_idle()):
            return False
        self._of[address] += 1
        self.wait(connection, address)
        return True

    def _most_idle(self) -> str:
        return max(self._idle, key=lambda address: len(self._idle[address]), default="")

    def _make_room(self, address: str) -> bool:
        idle = self._idle.get(address)
        if not idle:
            return False
        oldest = next(iter(idle))
        self.exit(oldest, address)
        oldest.leave()
        return True

    def wait(self, connection: Connection, address: str) -> None:
        """It has asked nothing whole: it may be told to leave."""
        self._idle.setdefault(address, {})[connection] = None

    def work(self, connection: Connection, address: str) -> None:
        """It is being answered."""
        idle = self._idle.get(address, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(address, None)

    def exit(self, connection: Connection, address: str) -> None:
        """It is gone."""
        self.work(connection, address)
        self._of[address] -= 1
        if self._of[address] <= 0:
            del self._of[address]


def usual_limit() -> ConnectionLimit:
    """As many as descriptors allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ConnectionLimit(max(16, min(MOST, files - RESERVED)))
