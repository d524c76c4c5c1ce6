"""When a worker calls itself deaf: a busy one is not, and nobody's training ends for the CPU lane."""

from __future__ import annotations

import contextlib
import time

import pytest

from shared.settings import Settings
from shared.store.lifecycle import Lane
from worker.host.flags import SharedFlags
from worker.host.presence import EXIT_DEAF, Presence

CHILDREN = 3
LONG_AGO = 10_000.0


class Listening(Presence):
    """A worker for whose lane `waits` work has waited long, with a broker that is well."""

    def __init__(self, flags: SharedFlags, waits: Lane) -> None:
        self.ends: list[int] = []
        self.deputies: list[Lane] = []
        self.waits = waits
        super().__init__(
            Settings(database_url="postgresql+psycopg://nobody@localhost/nowhere"),
            flags,
            children=CHILDREN,
            on_deaf=self.ends.append,
        )

    def _write(self, verb: object) -> frozenset[Lane]:  # type: ignore[override]  # what the database would answer
        return frozenset({self.waits})

    def _send_deputy(self, lane: Lane) -> None:
        self.deputies.append(lane)

    def _broker_answers(self) -> bool:
        return True

    def look(self) -> list[int]:
        """How it wants to end after one look, when all has been silent for long."""
        self._watched = self._heard = time.monotonic() - LONG_AGO
        self._watch()
        return self.ends


@pytest.mark.parametrize("waits", ["cpu", "training"])
def test_a_child_that_is_idle_and_does_not_pull_is_deaf(waits: Lane) -> None:
    presence = Listening(SharedFlags(), waits)

    assert presence.look() == [EXIT_DEAF]
    assert presence.deputies == [waits]


@pytest.mark.parametrize("waits", ["cpu", "training"])
def test_a_worker_whose_children_are_all_inside_tasks_is_busy_and_not_deaf(waits: Lane) -> None:
    flags = SharedFlags()
    with contextlib.ExitStack() as tasks:
        for child in range(CHILDREN):
            tasks.enter_context(flags.at_work("cpu", child=child))
        presence = Listening(flags, waits)
        assert presence.look() == []
        presence._watched -= LONG_AGO
        presence._watch()
        assert presence.ends == [], "its silence begins when a child is idle again"

    assert presence.look() == [EXIT_DEAF]


def test_work_of_the_cpu_lane_drains_no_training_and_a_deputy_does_it() -> None:
    flags = SharedFlags()
    presence = Listening(flags, "cpu")
    with flags.at_work("training", child=1):
        assert presence.look() == []
        assert presence.deputies == ["cpu"]

    assert presence.look() == [EXIT_DEAF]


def test_a_child_in_the_place_of_a_killed_one_is_idle() -> None:
    flags = SharedFlags()
    inside = [flags.at_work("cpu", child=child) for child in range(CHILDREN)]
    for task in inside:
        task.__enter__()  # killed there: nobody leaves
    assert not flags.has_idle_child(CHILDREN)

    flags.begin(child=1)

    assert flags.has_idle_child(CHILDREN)
