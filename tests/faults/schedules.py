"""Random fault schedules: what is submitted, what is ordered and what breaks, and when. One seed, one schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

# Behaviours of the fake trainer, each with the status that such a job must come to whatever breaks around it.
JOBS: Final = (
    ("steps=12 step_seconds=0.05 save=3", "succeeded"),
    ("steps=30 step_seconds=0.03 save=6", "succeeded"),
    ("steps=12 step_seconds=0.05 save=4 crash=9 once", "succeeded"),
    ("steps=6 save=3 files=20", "succeeded"),
    ("steps=10 step_seconds=0.05 save=100 daemon", "succeeded"),
    ("steps=20 step_seconds=0.05 save=5 ignore_term", "succeeded"),
    ("user_fault", "failed"),
    # A trainer that somebody has taken over (tests/hostile_trainer.py).
    ("lay=link_folder victim=/etc", "failed"),
    ("lay=fifo victim=/etc", "failed"),
    ("lay=many_files victim=/etc", "failed"),
    ("lay=sparse_file victim=/etc", "failed"),
)
FAULTS: Final = (
    "kill worker",
    "kill supervisor",
    "kill trainer",
    "drain worker",
    "freeze supervisor",
    "freeze worker",
    "freeze trainer",
    "kill janitor",
    "flush redis",
    "kill redis",
    "freeze redis",
    "cut redis",
    "silence redis",
    "restart postgres",
    "crash postgres",
    "end backends",
    "cut postgres",
    "silence postgres",
    "slow postgres",
    "refuse store",
    "silence store",
    "slow store",
    "reset store",
    "ring often",
    "crowd api",
)
EDGES: Final = (
    "claim_before_commit",
    "after_claim",
    "after_staging",
    "after_launch",
    "checkpoint_uploaded",
    "adapter_uploaded",
    "publish_before_commit",
    "after_publish",
)


@dataclass(frozen=True, slots=True)
class PlannedJob:
    at: float
    behaviour: str
    ends: str
    cancel_at: float | None
    pause_at: float | None


@dataclass(frozen=True, slots=True)
class Fault:
    """`seconds` is how long what can heal stays broken."""

    at: float
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    failpoint: str
    jobs: tuple[PlannedJob, ...]
    faults: tuple[Fault, ...]


def generate(seed: int) -> Schedule:
    """Two to four jobs within a second, two to four faults within the first seconds of their lives."""
    chance = random.Random(seed)
    failpoint = ""
    if chance.random() < 0.3:
        failpoint = f"{chance.choice(EDGES)}:{chance.choice(('exit', 'freeze'))}:once"
    jobs = tuple(_job(chance) for _ in range(chance.randint(2, 4)))
    faults = tuple(
        Fault(chance.uniform(0.2, 4.0), chance.choice(FAULTS), chance.uniform(0.3, 3.5))
        for _ in range(chance.randint(2, 4))
    )
    return Schedule(seed, failpoint, jobs, faults)


def _job(chance: random.Random) -> PlannedJob:
    behaviour, ends = chance.choice(JOBS)
    cancel_at = chance.uniform(0.2, 5.0) if chance.random() < 0.2 else None
    pause_at = chance.uniform(0.5, 4.0) if chance.random() < 0.15 else None
    return PlannedJob(chance.uniform(0.0, 1.0), behaviour, ends, cancel_at, pause_at)
