"""Verdicts: position, reason and forecast of waiting jobs, worked out only for jobs that somebody asks about.

Pure: no clock, no I/O. A queue of 100,000 jobs has 100,000 verdicts; a pass of the scheduler keeps a few words for
each and words them on demand.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import inf
from typing import Final, Literal, NamedTuple

from shared.plan.fairshare import GIB, Policy, QueuedJob, expected_seconds, longest_seconds

BlockedBy = Literal[
    "QUOTA_PROJECT",
    "QUOTA_KEY",
    "BUDGET",
    "NO_FIT_MEMORY",
    "NO_FIT_DEVICE",
    "BASE_MODEL_FETCHING",
    "NO_FREE_DEVICE",
    "RESERVED_FOR",
    "HELD",
    "BACKOFF_UNTIL",
    "DEVICE_QUARANTINED",
    "NO_WORKER",
]
NO_FORECAST: Final = frozenset(
    {
        "HELD",
        "BUDGET",
        "NO_FIT_MEMORY",
        "NO_FIT_DEVICE",
        "BASE_MODEL_FETCHING",
        "DEVICE_QUARANTINED",
        "NO_WORKER",
    }
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why one queued job waits."""

    position: (
        int  # 1-based in the effective order; a job set aside (held, over quota, ...) gets the place it would have
    )
    jobs_ahead: int
    blocked_by: BlockedBy
    detail: str  # numbers, and what would unblock it
    eta_low: datetime | None
    eta_high: datetime | None


class Reason(NamedTuple):
    """A reason kept unformatted, shared by many jobs: `template.format(*facts, job=job, gib=...)` is the detail."""

    code: BlockedBy
    template: str
    facts: tuple[object, ...] = ()


Waiting = tuple[QueuedJob, Reason, bool]  # False: set aside, so nobody waits for it


class Turn(NamedTuple):
    """A waiting job's place in the order."""

    job: QueuedJob
    position: int
    reason: Reason
    in_line: bool  # False: set aside, so nobody waits for it


class DeviceForecast(NamedTuple):
    """When each usable device is free at best and at worst (POSIX seconds; inf: nobody knows)."""

    now: float
    early: Sequence[float]
    late: Sequence[float]


class Verdicts(Mapping[str, Verdict]):
    """One verdict per waiting job, in the effective order, worded when read."""

    def __init__(self, waiting: Sequence[Waiting], outlook: DeviceForecast, *, policy: Policy) -> None:
        """`waiting`: in the effective order."""
        self._waiting = waiting
        self._outlook = outlook
        self._policy = policy

    @cached_property
    def _turns(self) -> dict[str, Turn]:
        turns, ahead = dict[str, Turn](), 0
        for job, reason, in_line in self._waiting:
            turns[job.id] = Turn(job, ahead + 1, reason, in_line)
            ahead += in_line
        return turns

    def __iter__(self) -> Iterator[str]:
        return iter(self._turns)

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, job_id: str) -> Verdict:
        turn = self._turns[job_id]
        low, high = self._eta(turn)
        return Verdict(
            position=turn.position,
            jobs_ahead=turn.position - 1,
            blocked_by=turn.reason.code,
            detail=turn.reason.template.format(*turn.reason.facts, job=turn.job, gib=self._gib(turn.job)),
            eta_low=_moment(low),
            eta_high=_moment(high),
        )

    def turns(self) -> Iterator[Turn]:
        """The waiting jobs in the effective order, unworded."""
        return iter(self._turns.values())

    def blocked(self) -> Counter[tuple[str, str]]:
        """How many wait by (project, reason); nothing is worded."""
        return Counter((turn.job.project, str(turn.reason.code)) for turn in self._turns.values())

    def _eta(self, turn: Turn) -> tuple[float, float]:
        if turn.reason.code in NO_FORECAST:
            return inf, inf
        lows, highs = self._starts
        place = min(turn.position, len(lows)) - 1
        low, high = (lows[place], highs[place]) if place >= 0 else (self._outlook.now, inf)
        if not turn.in_line:  # waits for its own project, key or back-off besides
            later = turn.job.not_before
            return low if later is None else max(low, later.timestamp()), inf
        return low, max(low, high)

    def _gib(self, job: QueuedJob) -> float:
        return job.bytes_per_device / GIB

    @cached_property
    def _starts(self) -> tuple[list[float], list[float]]:
        """Forecast starts by position: the jobs in line take the next devices in turn, at best and at worst."""
        policy, line = self._policy, [turn.job for turn in self._turns.values() if turn.in_line]
        early = _starts(self._outlook.early, [(job.devices, expected_seconds(job, policy=policy)) for job in line])
        late = _starts(self._outlook.late, [(job.devices, longest_seconds(job, policy=policy)) for job in line])
        return early, late


def _starts(ready: Sequence[float], work: Sequence[tuple[int, float]]) -> list[float]:
    heap, starts = sorted(ready), []
    for devices, seconds in work:
        if devices > len(heap):
            starts.append(inf)
        elif devices == 1:
            starts.append(heap[0])
            heapq.heapreplace(heap, heap[0] + seconds)
        else:
            taken = [heapq.heappop(heap) for _ in range(devices)]
            starts.append(taken[-1])
            for _ in range(devices):
                heapq.heappush(heap, taken[-1] + seconds)
    return starts


def _moment(seconds: float) -> datetime | None:
    return None if seconds == inf else datetime.fromtimestamp(seconds, tz=UTC)
