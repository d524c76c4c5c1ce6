"""How long one pass of `plan()` takes: 10,000 queued x 64 devices and 100,000 x 1,000, idle and busy pools.

Run: python bench/plan_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import header
from shared.plan.fairshare import GIB
from shared.plan.scheduling import Device, Plan, Policy, QueuedJob, RunningJob, Share, Tier, plan

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
TIERS: tuple[Tier, ...] = ("interactive", "normal", "best_effort")
PROJECTS = 40


def a_queue(count: int, rng: random.Random) -> list[QueuedJob]:
    """Jobs of 1, 2, 4 or 8 devices with every size of memory, from 40 projects and all tiers; some have aged."""
    return [
        QueuedJob(
            id=f"job-{n}",
            project=f"project-{rng.randrange(PROJECTS)}",
            key=f"key-{rng.randrange(200)}",
            tier=rng.choices(TIERS, (1, 8, 2))[0],
            priority=rng.randrange(5),
            submitted_at=NOON - timedelta(seconds=rng.randrange(100_000)),
            gpus=rng.choices((1, 2, 4, 8), (85, 8, 4, 3))[0],
            bytes_per_device=rng.randrange(1, 75 * GIB),
            max_runtime_seconds=rng.choice((None, 3600.0, 36_000.0)),
            expected_seconds=rng.lognormvariate(7.5, 1.4),
            preemptible=rng.random() < 0.7,
            base_model=f"base-{rng.randrange(10)}",
        )
        for n in range(count)
    ]


def a_pool(count: int, rng: random.Random) -> list[Device]:
    return [
        Device(
            id=f"gpu-{n}",
            host=f"host-{n // 8}",
            total_bytes=80 * GIB,
            free_bytes=80 * GIB - rng.randrange(GIB),
            cached_models=frozenset({f"base-{rng.randrange(10)}"}),
        )
        for n in range(count)
    ]


def its_running(devices: list[Device], rng: random.Random, *, share: float) -> list[RunningJob]:
    return [
        RunningJob(
            id=f"running-{device.id}",
            project=f"project-{rng.randrange(PROJECTS // 4)}",
            key="key-0",
            tier="normal",
            priority=0,
            device_ids=(device.id,),
            started_at=NOON - timedelta(seconds=rng.randrange(7200)),
            max_runtime_seconds=36_000.0,
            expected_seconds_left=rng.uniform(60, 20_000),
            preemptible=rng.random() < 0.7,
        )
        for device in devices
        if rng.random() < share
    ]


def measure(jobs: int, devices: int, *, busy: float, repeats: int) -> tuple[float, float, Plan]:
    """(best seconds of plan(), seconds to word every verdict, the last plan)."""
    rng = random.Random(7)
    queue, pool = a_queue(jobs, rng), a_pool(devices, rng)
    running = its_running(pool, rng, share=busy)
    shares = [Share(f"project-{n}", weight=1.0 + n % 3, usage=1e5 * (n % 7)) for n in range(PROJECTS)]
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        began = time.process_time()
        decision = plan(queue, running, pool, shares, policy=Policy(), now=NOON)
        best = min(best, time.process_time() - began)
    began = time.process_time()
    worded = [decision.verdicts[job_id] for job_id in decision.verdicts]
    assert len(worded) + len(decision.assignments) == jobs
    return best, time.process_time() - began, decision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only 10,000 x 64")
    sizes = [(10_000, 64, 0.2)] if parser.parse_args().quick else [(10_000, 64, 0.2), (100_000, 1000, 0.7)]
    print(f"Python {platform.python_version()}, {header()}; times are CPU time of one core")
    print("  queued  devices   busy     plan()   target  started  stopped  all verdicts")
    for jobs, devices, target in sizes:
        for busy in (0.0, 0.9, 1.0):
            seconds, worded, decision = measure(jobs, devices, busy=busy, repeats=3)
            started, stopped = len(decision.assignments), len(decision.preemptions)
            print(
                f"{jobs:>8} {devices:>8} {busy:>6.0%} {seconds * 1000:>7.0f} ms {target * 1000:>5.0f} ms"
                f" {started:>8} {stopped:>8} {worded * 1000:>10.0f} ms"
            )


if __name__ == "__main__":
    main()
