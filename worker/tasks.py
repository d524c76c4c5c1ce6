"""The two bells. A task is a door: it calls one verb."""

from __future__ import annotations

from worker.app import app, this_host
from worker.pull import pull


@app.task(name="training.pull")
def pull_training(_pool: str) -> None:
    pull("training", this_host())


@app.task(name="cpu.pull")
def pull_cpu(_pool: str) -> None:
    pull("cpu", this_host())
