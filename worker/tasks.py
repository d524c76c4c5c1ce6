"""The two bells. A task is a door: it calls one verb. A host whose clock is wrong hears a bell, too."""

from __future__ import annotations

import time
from typing import Final

from celery.worker.request import Request

from shared.store.bell import TASKS
from shared.store.lifecycle import Lane
from worker.app import app, flags, this_host
from worker.pull import pull

JUST_NOW_SECONDS: Final = 1.0
_LANES: Final[dict[str, Lane]] = {name: lane for lane, name in TASKS.items()}


class Ring(Request):
    """A ring as the main process receives it. One that has expired is dropped only if its lane has just pulled.

    Expiry keeps the rings of a long absence from costing a query each. But sender and receiver compare two hosts'
    clocks: a worker whose clock is ahead by more than the expiry would drop every ring.
    """

    def maybe_expire(self) -> bool:
        silent = time.monotonic() - flags.last_pull(_LANES[self.name])
        return silent < JUST_NOW_SECONDS and bool(super().maybe_expire())


@app.task(name="training.pull", Request=Ring)
def pull_training(_pool: str) -> None:
    pull("training", this_host())


@app.task(name="cpu.pull", Request=Ring)
def pull_cpu(_pool: str) -> None:
    pull("cpu", this_host())
