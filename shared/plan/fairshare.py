"""The effective order of a queue: projects take turns by decayed use, nobody is forgotten. Pure: no clock, no I/O."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from shared.plan.capacity import Abilities
from shared.plan.preemption import BEST_EFFORT, RANK, RunningJob, Tier

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that waits. `submitted_at` is the first submission, also after a retry or a preemption."""

    id: str
    project: str
    key: str
    submitted_at: datetime
    tier: Tier = "normal"
    priority: int = 0  # higher first, inside its project and tier
    gpus: int = 1  # devices on each host
    nodes: int = 1
    bytes_per_device: int = 0
    max_runtime_seconds: float | None = None
    expected_seconds: float | None = None
    not_before: datetime | None = None  # end of the back-off after a failed attempt
    preemptible: bool = True
    held: bool = False
    base_model: str = ""
    needs_gpu: bool = False
    needs_bfloat16: bool = False
    needs_capability: int | None = None  # of NVIDIA's GPUs: 80 is 8.0

    @property
    def needs(self) -> Abilities:
        """What it asks of each device besides memory. Several devices of one job are whole GPUs."""
        capability = self.needs_capability or 0
        whole = self.devices > 1
        return Abilities(self.needs_gpu, self.needs_bfloat16, capability, whole, self.base_model, self.nodes > 1)

    @property
    def devices(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True, slots=True)
class Share:
    """A project's rights and what it has used.

    `usage` is in device-seconds, decayed, and contains the `charge` of every job that runs: it is written when the job
    is leased and corrected when the lease ends.
    """

    project: str
    weight: float = 1.0
    usage: float = 0.0
    guarantee: int = 0  # devices that are its own when it wants them
    max_running: int | None = None  # devices
    key_max_running: Mapping[str, int] = field(default_factory=dict)  # key -> devices
    budget_left_seconds: float | None = None  # device-seconds until the hard limit
    held: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """The pool's rules."""

    half_life: timedelta = timedelta(days=7)
    max_wait: timedelta = timedelta(hours=24)
    min_runtime: timedelta = timedelta(minutes=10)  # nobody is stopped earlier
    preempt_grace: timedelta = timedelta(minutes=2)  # from the request to a free device
    foreign_tolerance_bytes: int = GIB // 2  # a desktop on the GPU is no stranger
    entry_seconds: float = 3600.0  # charged for each device of a job whose duration nobody could estimate
    preemptions_per_pass: int = 32
    eta_slack: float = 2.0  # worst case = expected time x slack, where no max_runtime bounds it
    held: bool = False  # the whole pool


def decayed(usage: float, *, elapsed: timedelta, half_life: timedelta) -> float:
    """Usage after `elapsed`: usage x 0.5^(elapsed / half-life)."""
    return float(usage * 0.5 ** (elapsed / half_life))


def expected_seconds(job: QueuedJob, *, policy: Policy) -> float:
    """How long a job will hold its devices, as far as anybody knows."""
    seconds = job.expected_seconds if job.expected_seconds is not None else policy.entry_seconds
    return seconds if job.max_runtime_seconds is None else min(seconds, job.max_runtime_seconds)


def longest_seconds(job: QueuedJob, *, policy: Policy) -> float:
    """How long a job may hold its devices: its limit, or else the expected time with some slack."""
    if job.max_runtime_seconds is not None:
        return job.max_runtime_seconds
    return expected_seconds(job, policy=policy) * policy.eta_slack


def charge(job: QueuedJob, *, policy: Policy) -> float:
    """Device-seconds that a project pays when the job is leased: its expected time on each of its devices."""
    return expected_seconds(job, policy=policy) * job.devices


Item = tuple[bool, int, float, str, QueuedJob]  # not aged, -priority, submitted, id, job: the order inside a tier
Place = tuple[int, int, float, Item]  # class (0 aged, 1 guaranteed, 2 the rest), rank, share, item


class ProjectQueue:
    """One project's queue, and its account while a pass goes on.

    Two sets of figures: `planned`, `firm` and `usage` count every job that has had its turn, started or waiting, so
    projects also alternate in the positions; `taken`, `spent` and `budget` count only devices really held.
    """

    def __init__(self, share: Share, running: Iterable[RunningJob]) -> None:
        held = list(running)
        self.share = share
        self.running = held
        self.usage = self.spent = share.usage
        self.planned = self.taken = sum(len(job.device_ids) for job in held)
        self.firm = sum(len(job.device_ids) for job in held if job.firm)
        self.budget = share.budget_left_seconds
        self.by_key = Counter[str]()
        for job in held:
            self.by_key[job.key] += len(job.device_ids)
        self.part = 1.0  # devices; its part of the pool by weight, at least one
        self._aged: tuple[list[Item], ...] = ([], [], [])
        self._fresh: tuple[list[Item], ...] = ([], [], [])

    def queue(self, jobs: Iterable[QueuedJob], *, aged_before: float) -> None:
        """Take in the waiting jobs; those submitted at or before `aged_before` (POSIX seconds) have waited too long."""
        for job in jobs:
            submitted = job.submitted_at.timestamp()
            if submitted <= aged_before:
                self._aged[RANK[job.tier]].append((False, 0, submitted, job.id, job))
            else:
                self._fresh[RANK[job.tier]].append((True, -job.priority, submitted, job.id, job))
        for stack in (*self._aged, *self._fresh):
            stack.sort(reverse=True)  # the next job is the last item

    def head(self) -> tuple[Place, list[Item]] | None:
        """The project's next job and its place among all projects, or None when its queue is empty."""
        share = self.usage / self.share.weight
        first, second, third = self._aged
        if first or second or third:
            return self._oldest(min((stack for stack in self._aged if stack), key=lambda stack: stack[-1]), share)
        best: tuple[Place, list[Item]] | None = None
        for rank, stack in enumerate(self._fresh):
            if stack:
                if not self.share.guarantee:
                    return (2, rank, share, stack[-1]), stack
                guaranteed = self.guarantees(stack[-1][-1])
                if guaranteed or best is None:
                    best = (1 if guaranteed else 2, rank, share, stack[-1]), stack
                if guaranteed:
                    break
        return best

    def _oldest(self, stack: list[Item], share: float) -> tuple[Place, list[Item]]:
        """An aged job's place: before everything below the project's part; above it, before the project's own jobs."""
        item = stack[-1]
        if self.planned < self.part:
            return (0, 0, 0.0, item), stack
        rank = next(rank for rank in range(3) if self._aged[rank] or self._fresh[rank])
        return (1 if self.guarantees(item[-1]) else 2, rank, share, item), stack

    def guarantees(self, job: QueuedJob) -> bool:
        """Whether the project's guarantee still covers the job; best effort always borrows."""
        limit = self.share.guarantee
        return limit > 0 and RANK[job.tier] != BEST_EFFORT and self.firm + job.devices <= limit

    def take_turn(self, job: QueuedJob, cost: float) -> None:
        """Count a job that has had its turn, whether it starts or waits."""
        self.usage += cost
        self.planned += job.devices
        if RANK[job.tier] != BEST_EFFORT:
            self.firm += job.devices

    def take_devices(self, job: QueuedJob, cost: float) -> None:
        """Count a job that gets devices, now or when a preemption frees them."""
        self.spent += cost
        self.taken += job.devices
        self.by_key[job.key] += job.devices
        if self.budget is not None:
            self.budget -= cost


def lanes(
    queue: Iterable[QueuedJob],
    running: Iterable[RunningJob],
    shares: Iterable[Share],
    *,
    devices: int,
    aged_before: float,
) -> dict[str, ProjectQueue]:
    """Every project's lane; `devices` is the number of usable devices that the active projects divide by weight."""
    waiting, held = dict[str, list[QueuedJob]](), dict[str, list[RunningJob]]()
    for job in queue:
        waiting.setdefault(job.project, []).append(job)
    for runner in running:
        held.setdefault(runner.project, []).append(runner)
    known = {share.project: share for share in shares}
    active = sorted(waiting.keys() | held.keys())
    queues = {name: ProjectQueue(known.get(name) or Share(name), held.get(name, ())) for name in active}
    total = sum(lane.share.weight for lane in queues.values())
    for name, lane in queues.items():
        lane.part = max(1.0, lane.share.guarantee, devices * lane.share.weight / total)
        lane.queue(waiting.get(name, ()), aged_before=aged_before)
    return queues


def turns(queues: Mapping[str, ProjectQueue]) -> Iterator[tuple[QueuedJob, ProjectQueue, bool]]:
    """The effective order: (job, its lane, went ahead because it aged).

    The consumer calls `take_turn` between two steps, which moves the project back; a job that is set aside costs
    its project nothing.
    """
    heap = [(*head, name) for name, lane in queues.items() if (head := lane.head()) is not None]
    heapq.heapify(heap)
    while heap:
        place, stack, name = heap[0]
        yield stack.pop()[-1], queues[name], place[0] == 0
        head = queues[name].head()
        if head is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (*head, name))
