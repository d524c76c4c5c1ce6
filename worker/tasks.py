"""The two bells. A task is a door: it calls one verb."""

from __future__ import annotations

from worker.app import app, flags, this_host
from worker.pull import pull
from worker.ring import ring_of

Ring = ring_of(flags)


@app.task(name="training.pull", Request=Ring)
def pull_training(_pool: str) -> None:
    pull("training", this_host())


@app.task(name="cpu.pull", Request=Ring)
def pull_cpu(_pool: str) -> None:
    pull("cpu", this_host())
