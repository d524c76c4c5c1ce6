"""Random fault schedules against real processes: `make chaos N=500 SEED=1`; a break is played again with its seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.schedules import generate
from tests.faults.world import Worlds

SEED = int(os.environ.get("TUNEPOOL_CHAOS_SEED", "1"))
SCHEDULES = int(os.environ.get("TUNEPOOL_CHAOS_SCHEDULES", "3"))


@pytest.fixture(scope="module")
def worlds(migrated_cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(lambda: tmp_path_factory.mktemp("world"), cluster=migrated_cluster)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(SEED, SEED + SCHEDULES))
def test_whatever_breaks_every_accepted_job_ends_once_and_as_it_should(worlds: Worlds, seed: int) -> None:
    schedule = generate(seed)

    broken = worlds.play(schedule)

    assert broken == [], f"play it again: make chaos N=1 SEED={seed}\n{schedule}"
