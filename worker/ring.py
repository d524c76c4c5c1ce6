"""How the worker's main process receives a ring. A host whose clock is wrong hears it, too."""

from __future__ import annotations

import time
from typing import Final

from celery.worker.request import Request

from shared.store.bell import TASKS
from shared.store.lifecycle import Lane
from worker.host.flags import SharedFlags

JUST_NOW_SECONDS: Final = 1.0
_LANES: Final[dict[str, Lane]] = {name: lane for lane, name in TASKS.items()}


def ring_of(flags: SharedFlags) -> type[Request]:
    """The class of the rings that a worker with these flags receives."""

    class Ring(Request):
        """One that has expired is dropped only if its lane has just pulled.

        Expiry keeps the rings of a long absence from costing a query each. But sender and receiver compare two hosts'
        clocks: by its own, a worker that is ahead by more than the expiry would never hear anything.
        """

        def maybe_expire(self) -> bool:
            silent = time.monotonic() - flags.last_pull(_LANES[self.name])
            return silent < JUST_NOW_SECONDS and bool(super().maybe_expire())

    return Ring
