from __future__ import annotations

from pathlib import Path

from worker.program.launcher import SPINS, environment
from worker.program.processes import Tag, own_tag


def tag() -> Tag:
    return own_tag(home=Path("/home/pool"), job_id="ftjob-1", fence=1)


def test_threads_of_a_trainer_sleep_while_they_wait_for_one_another() -> None:
    told = environment(tag=tag(), device_ids=("host:cpu",), kind="cpu", threads=3, scratch=Path("/scratch"))

    assert (told["OMP_NUM_THREADS"], told["GOMP_SPINCOUNT"]) == ("3", SPINS)
