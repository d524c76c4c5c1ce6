"""A whole pool in simulated time: the service's own `plan()` against FIFO, priority only and a Slurm-like multifactor.

Every policy sees the same jobs, the same devices and the same passes (one every `--interval` simulated seconds in
which something changed). Durations are heavy-tailed (lognormal), CI projects submit in bursts, one project wants far
more than its part. A stopped job keeps its progress, pays `--restart` seconds and frees its devices after `--grace`.

    python bench/pool_simulation.py                                   # 1,000 GPUs, 100,000 jobs: some minutes
    python bench/pool_simulation.py --hosts 16 --jobs 4000 --interval 60
    python bench/pool_simulation.py --hosts 100 --jobs 13500 --load 4 # 10,000 jobs wait at a time: docs/operations.md
    python bench/pool_simulation.py --trace jobs.csv --hosts 125      # job_id,project,submit_seconds,gpus,
                                                                      # duration_seconds[,tier,memory_gib]
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared.plan.fairshare import GIB
from shared.plan.scheduling import Device, Policy, QueuedJob, RunningJob, Share, Tier, charge, decayed, plan

START = datetime(2026, 1, 1, tzinfo=UTC)
MEMORY_GIB = 80
RULES = Policy(entry_seconds=1800.0)
Decision = tuple[list[tuple[str, tuple[str, ...]]], list[str]]  # starts (job, devices) and stops


@dataclass(frozen=True, slots=True)
class TraceJob:
    id: str
    project: str
    submit: float  # seconds since the start
    gpus: int
    duration: float
    tier: Tier = "normal"
    memory_gib: float = 10.0


@dataclass
class World:
    """The pool at one moment."""

    now: float
    devices: list[Device]
    weights: dict[str, float]
    queue: dict[str, QueuedJob] = field(default_factory=dict)
    running: dict[str, RunningJob] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    backfilled: set[str] = field(default_factory=set)

    @property
    def moment(self) -> datetime:
        return START + timedelta(seconds=self.now)

    def free(self) -> dict[str, list[str]]:
        """host -> ids of its free devices."""
        busy = {device_id for job in self.running.values() for device_id in job.device_ids}
        hosts: dict[str, list[str]] = defaultdict(list)
        for device in self.devices:
            if device.id not in busy:
                hosts[device.host].append(device.id)
        return hosts


# ---- the four policies


def ours(world: World) -> Decision:
    shares = [Share(name, weight=weight, usage=world.usage[name]) for name, weight in world.weights.items()]
    done = plan(world.queue.values(), world.running.values(), world.devices, shares, policy=RULES, now=world.moment)
    for assignment in done.assignments:
        if assignment.backfill:
            world.backfilled.add(assignment.job_id)
    return [(a.job_id, a.device_ids) for a in done.assignments], [p.victim_id for p in done.preemptions]


RANKS = {tier: rank for rank, tier in enumerate(get_args(Tier))}


def fifo(world: World) -> Decision:
    """Strictly first come, first served: the first job that does not fit stops the queue."""
    free, starts = world.free(), []
    for job in sorted(world.queue.values(), key=lambda job: (job.submitted_at, job.id)):
        if (chosen := take(free, job)) is None:
            break
        starts.append((job.id, chosen))
    return starts, []


def priority_only(world: World) -> Decision:
    """By tier, then first come; what does not fit is passed over."""
    free, starts = world.free(), []
    for job in sorted(world.queue.values(), key=lambda job: (RANKS[job.tier], job.submitted_at, job.id)):
        if not any(free.values()):
            break
        if (chosen := take(free, job)) is not None:
            starts.append((job.id, chosen))
    return starts, []


def multifactor(world: World) -> Decision:
    """Slurm's shape: 10,000 x fair share + 5,000 x QOS + 2,000 x age (full after 7 d), EASY backfill by time limits."""
    used, weighed = sum(world.usage.values()) or 1.0, sum(world.weights.values())
    fair = {name: 2 ** -((world.usage[name] / used) / (weight / weighed)) for name, weight in world.weights.items()}

    def score(job: QueuedJob) -> float:
        age = min(1.0, (world.moment - job.submitted_at).total_seconds() / 604_800)
        return -(10_000 * fair[job.project] + 5_000 * (1 - RANKS[job.tier] / 2) + 2_000 * age)

    free, starts, shadow = world.free(), [], math.inf
    blocked = False
    for job in sorted(world.queue.values(), key=lambda job: (score(job), job.submitted_at, job.id)):
        if not any(free.values()):
            break
        if blocked and world.now + (job.max_runtime_seconds or math.inf) > shadow:
            continue
        if (chosen := take(free, job)) is not None:
            starts.append((job.id, chosen))
        elif not blocked:
            blocked, shadow = True, shadow_time(world, job)
    return starts, []


def shadow_time(world: World, job: QueuedJob) -> float:
    """When the job can start at the latest if every running job uses its whole limit."""
    free = world.free()
    ends = sorted(world.running.values(), key=limit_of)
    where = {device.id: device.host for device in world.devices}
    for other in ends:
        for device_id in other.device_ids:
            free[where[device_id]].append(device_id)
        if sum(len(ids) >= job.gpus for ids in free.values()) >= job.nodes:
            return limit_of(other)
    return world.now


def limit_of(job: RunningJob) -> float:
    return (job.started_at - START).total_seconds() + (job.max_runtime_seconds or math.inf)


def take(free: dict[str, list[str]], job: QueuedJob) -> tuple[str, ...] | None:
    """Devices for a job on the fullest hosts that have enough, or None."""
    fitting = [(len(ids), host) for host, ids in free.items() if len(ids) >= job.gpus]
    if len(fitting) < job.nodes:
        return None
    chosen = []
    for _, host in heapq.nsmallest(job.nodes, fitting):
        chosen += free[host][: job.gpus]
        free[host] = free[host][job.gpus :]
    return tuple(chosen)


POLICIES: dict[str, Callable[[World], Decision]] = {
    "tunepool": ours,
    "fifo": fifo,
    "priority": priority_only,
    "multifactor": multifactor,
}


# ---- simulated time


@dataclass
class Life:
    """One job's history."""

    job: TraceJob
    left: float
    queued_at: float
    waited: float = 0.0
    attempts: int = 0
    ended: float | None = None


class Simulation:
    """Jobs arrive and end; a pass decides every `interval` seconds in which something changed."""

    def __init__(self, trace: list[TraceJob], options: argparse.Namespace, decide: Callable[[World], Decision]) -> None:
        self.options, self.decide = options, decide
        self.lives = {job.id: Life(job, job.duration, job.submit) for job in trace}
        self.arrivals = sorted(trace, key=lambda job: (job.submit, job.id), reverse=True)
        self.last_submit = max(job.submit for job in trace)
        self.ends: list[tuple[float, str, int, bool]] = []  # (time, job, attempt, stopped)
        weights = {job.project: 1.0 for job in trace}
        self.world = World(0.0, pool(options), dict(sorted(weights.items())))
        self.limits = limits(trace, options.seed)
        self.busy_seconds = 0.0
        self.preemptions = 0
        self.jain = Mean()
        self.charged: dict[str, float] = {}
        self.decayed_at = 0.0
        self.passes: list[tuple[int, float]] = []  # (waiting jobs, processor seconds of the decision)

    def run(self) -> None:
        while self.arrivals or self.ends or self.world.queue:
            upcoming = [self.arrivals[-1].submit] if self.arrivals else []
            upcoming += [self.ends[0][0]] if self.ends else []
            assert upcoming, "jobs wait that nothing will ever start"
            self.advance(
                math.ceil(max(min(upcoming), self.world.now + 1e-9) / self.options.interval) * self.options.interval
            )

    def advance(self, moment: float) -> None:
        while self.arrivals and self.arrivals[-1].submit <= moment:
            self.enqueue(self.lives[self.arrivals.pop().id])
        while self.ends and self.ends[0][0] <= moment:
            self.end(*heapq.heappop(self.ends))
        self.world.now = moment
        self.decay()
        if self.world.queue:
            self.observe()
            waiting, began = len(self.world.queue), time.process_time()
            starts, stops = self.decide(self.world)
            self.passes.append((waiting, time.process_time() - began))
            for job_id, device_ids in starts:
                self.start(job_id, device_ids)
            for job_id in stops:
                self.stop(job_id)

    def decay(self) -> None:
        elapsed = timedelta(seconds=self.world.now - self.decayed_at)
        for project in self.world.usage:
            self.world.usage[project] = decayed(self.world.usage[project], elapsed=elapsed, half_life=RULES.half_life)
        self.decayed_at = self.world.now

    def enqueue(self, life: Life) -> None:
        job, per_host = life.job, self.options.gpus_per_host
        hosts = math.ceil(job.gpus / per_host)
        expected, limit = self.limits[job.id]
        done = life.left / job.duration
        self.world.queue[job.id] = QueuedJob(
            id=job.id,
            project=job.project,
            key=job.project,
            tier=job.tier,
            submitted_at=START + timedelta(seconds=job.submit),
            gpus=math.ceil(job.gpus / hosts),
            nodes=hosts,
            bytes_per_device=int(job.memory_gib * GIB),
            expected_seconds=expected * done,
            max_runtime_seconds=limit * done + self.options.restart * life.attempts,
        )

    def start(self, job_id: str, device_ids: tuple[str, ...]) -> None:
        life, job, world = self.lives[job_id], self.world.queue.pop(job_id), self.world
        life.waited += world.now - life.queued_at
        life.attempts += 1
        overhead = self.options.restart if life.attempts > 1 else 0.0
        world.running[job_id] = RunningJob(
            id=job_id,
            project=job.project,
            key=job.key,
            tier=job.tier,
            priority=0,
            device_ids=device_ids,
            started_at=world.moment,
            max_runtime_seconds=job.max_runtime_seconds,
            backfill=job_id in world.backfilled,
        )
        world.backfilled.discard(job_id)
        self.charged[job_id] = charge(job, policy=RULES)
        world.usage[job.project] += self.charged[job_id]
        heapq.heappush(self.ends, (world.now + life.left + overhead, job_id, life.attempts, False))

    def stop(self, job_id: str) -> None:
        self.preemptions += 1
        self.world.running[job_id] = replace(self.world.running[job_id], preempt_requested=True)
        heapq.heappush(self.ends, (self.world.now + self.options.grace, job_id, self.lives[job_id].attempts, True))

    def end(self, moment: float, job_id: str, attempt: int, stopped: bool) -> None:
        life = self.lives[job_id]
        if job_id not in self.world.running or life.attempts != attempt:
            return  # the other of its two ends came first
        job = self.world.running.pop(job_id)
        ran = moment - (job.started_at - START).total_seconds()
        self.world.usage[job.project] += ran * len(job.device_ids) - self.charged.pop(job_id)
        self.world.usage[job.project] = max(0.0, self.world.usage[job.project])
        within = min(moment, self.last_submit) - min((job.started_at - START).total_seconds(), self.last_submit)
        self.busy_seconds += within * len(job.device_ids)
        if stopped:
            life.left -= max(0.0, ran - (self.options.restart if attempt > 1 else 0.0))
            life.queued_at = moment
            self.enqueue(life)
        else:
            life.ended = moment

    def observe(self) -> None:
        """Jain's index of devices held, over the projects that have more work than devices."""
        held: dict[str, float] = {job.project: 0.0 for job in self.world.queue.values()}
        for job in self.world.running.values():
            if job.project in held:
                held[job.project] += len(job.device_ids)
        if len(held) > 1 and self.world.now <= self.last_submit:
            self.jain.add(jain(held.values()))


class Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)


def jain(values: Iterable[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 = all equal, 1/n = one has everything."""
    found = list(values)
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


def pool(options: argparse.Namespace) -> list[Device]:
    memory = MEMORY_GIB * GIB
    return [
        Device(id=f"h{host:04}-{n}", host=f"h{host:04}", total_bytes=memory, free_bytes=memory)
        for host in range(options.hosts)
        for n in range(options.gpus_per_host)
    ]


def limits(trace: list[TraceJob], seed: int) -> dict[str, tuple[float, float]]:
    """(expected seconds, max_runtime) of each job: estimates are off by a lognormal factor, limits are generous."""
    rng = random.Random(seed + 1)
    return {
        job.id: (job.duration * rng.lognormvariate(0, 0.4), job.duration * rng.uniform(1.2, 4.0) + 60) for job in trace
    }


# ---- traces


def generated(options: argparse.Namespace) -> list[TraceJob]:
    """Twenty projects of very different appetite; two of them are CI and submit bursts of short interactive jobs."""
    rng = random.Random(options.seed)
    appetite = [30, 12, 8, *([4] * 7), *([2] * 8)]  # project-00 wants a third of everything
    people = [f"project-{n:02}" for n in range(len(appetite))]
    jobs = [
        TraceJob(
            id=f"j{n:06}",
            project=rng.choices(people, appetite)[0],
            submit=0.0,
            gpus=min(
                rng.choices((1, 2, 4, 8, 16, 32), (800, 80, 60, 50, 8, 2))[0], options.hosts * options.gpus_per_host
            ),
            duration=min(max(30.0, rng.lognormvariate(math.log(1200), 1.5)), 7 * 86_400.0),
            tier=rng.choices(("normal", "best_effort"), (85, 15))[0],
        )
        for n in range(int(options.jobs * 0.7))
    ]
    bursts = [
        TraceJob(f"c{n:06}", f"ci-{n % 2}", 0.0, 1, rng.lognormvariate(math.log(240), 0.6), tier="interactive")
        for n in range(options.jobs - len(jobs))
    ]
    devices = options.hosts * options.gpus_per_host
    horizon = sum(job.gpus * job.duration for job in (*jobs, *bursts)) / (devices * options.load)
    placed = [replace(job, submit=rng.uniform(0, horizon)) for job in jobs]
    moment = 0.0
    for n, job in enumerate(bursts):
        if n % 150 == 0:  # one push to a busy branch starts a matrix of jobs
            moment = rng.uniform(0, horizon)
        placed.append(replace(job, submit=moment + rng.uniform(0, 60)))
    return placed


def read(path: Path, options: argparse.Namespace) -> list[TraceJob]:
    """A CSV trace; jobs that the simulated pool could never hold are left out and counted."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = [from_row(row) for row in csv.DictReader(lines)]
    devices = options.hosts * options.gpus_per_host
    kept = [job for job in rows if 0 < job.gpus <= devices and job.duration > 0 and job.memory_gib * 1.1 <= MEMORY_GIB]
    if len(kept) < len(rows):
        print(f"left out {len(rows) - len(kept)} of {len(rows)} jobs that never fit this pool", file=sys.stderr)
    first = min(job.submit for job in kept)
    return [replace(job, submit=job.submit - first) for job in kept[: options.jobs]]


def from_row(row: Mapping[str, str]) -> TraceJob:
    tier = row.get("tier") or "normal"
    if tier not in RANKS:
        raise SystemExit(f"job {row['job_id']}: tier must be one of {', '.join(RANKS)}, not {tier!r}")
    return TraceJob(
        id=row["job_id"],
        project=row["project"],
        submit=float(row["submit_seconds"]),
        gpus=int(row["gpus"]),
        duration=float(row["duration_seconds"]),
        tier=tier,  # type: ignore[arg-type]
        memory_gib=float(row.get("memory_gib") or 10.0),
    )


# ---- the report


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def by_project(simulation: Simulation) -> dict[str, list[float]]:
    waits: dict[str, list[float]] = defaultdict(list)
    for life in simulation.lives.values():
        waits[life.job.project].append(life.waited)
    return waits


def summary(name: str, simulation: Simulation, seconds: float) -> str:
    lives = simulation.lives.values()
    waits = [life.waited for life in lives]
    slowdown: dict[str, list[float]] = defaultdict(list)
    for life in lives:
        slowdown[life.job.project].append((life.waited + life.job.duration) / max(600.0, life.job.duration))
    capacity = len(simulation.world.devices) * simulation.last_submit
    ended = max(life.ended or 0.0 for life in lives)
    return (
        f"{name:<12} {percentile(waits, 0.5) / 60:>8.1f} {percentile(waits, 0.95) / 60:>9.1f} {max(waits) / 3600:>8.1f}"
        f" {simulation.jain.value:>7.3f} {jain(max(1.0, statistics.fmean(s)) for s in slowdown.values()):>10.3f}"
        f" {simulation.busy_seconds / capacity:>7.1%} {simulation.preemptions:>8} {ended / 3600:>9.1f} {seconds:>7.0f}"
    )


def queues(done: Mapping[str, Simulation]) -> None:
    """How long the queue was, and what a decision costs where it was longest."""
    print("\nlongest queue; processor seconds of a pass: median, and the median of the tenth with the longest queues")
    for name, simulation in done.items():
        passes = sorted(simulation.passes)
        longest = [seconds for _, seconds in passes[-max(1, len(passes) // 10) :]]
        usual = statistics.median(seconds for _, seconds in passes)
        print(f"{name:<12} {passes[-1][0]:>9,} {usual:>9.3f} {statistics.median(longest):>9.3f}")


def report(done: Mapping[str, Simulation]) -> None:
    print("\nminutes waited, p50 / p95, by project (all attempts of a job together)")
    print(f"{'project':<14}" + "".join(f"{name:>20}" for name in done))
    tables = {name: by_project(simulation) for name, simulation in done.items()}
    for project in sorted(next(iter(tables.values()))):
        cells = [
            f"{percentile(table[project], 0.5) / 60:.1f} / {percentile(table[project], 0.95) / 60:.1f}"
            for table in tables.values()
        ]
        print(f"{project:<14}" + "".join(f"{cell:>20}" for cell in cells))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV file instead of generated jobs")
    parser.add_argument("--hosts", type=int, default=125)
    parser.add_argument("--gpus-per-host", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.95, help="work asked for / capacity, of generated jobs")
    parser.add_argument("--interval", type=float, default=300.0, help="simulated seconds between two passes")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds from a stop to a free device")
    parser.add_argument("--restart", type=float, default=60.0, help="seconds that a resumed job loses")
    parser.add_argument("--policies", nargs="+", choices=[*POLICIES], default=[*POLICIES])
    return parser.parse_args()


def main() -> None:
    options = arguments()
    trace = read(options.trace, options) if options.trace else generated(options)
    print(f"{len(trace):,} jobs, {options.hosts} hosts x {options.gpus_per_host} devices, seed {options.seed}")
    print("policy        p50 min   p95 min    max h  Jain   Jain slow.   used   stopped  makespan h   run s")
    done = {}
    for name in options.policies:
        began = time.process_time()
        simulation = Simulation(trace, options, POLICIES[name])
        simulation.run()
        print(summary(name, simulation, time.process_time() - began), flush=True)
        done[name] = simulation
    queues(done)
    report(done)


if __name__ == "__main__":
    main()
