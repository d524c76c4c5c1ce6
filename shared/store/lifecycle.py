"""The states of a job and of an attempt, and every move that is allowed. Pure; docs/lifecycle.md tells it in prose."""

from __future__ import annotations

from typing import Final, Literal, get_args

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
AttemptPhase = Literal["leased", "staging", "training", "publishing"]
# Of a further host of an attempt on several; `ended`: nothing of it lives there.
MemberPhase = Literal["called", "staging", "ready", "training", "ended"]
AttemptOutcome = Literal[
    "succeeded", "failed", "cancelled", "paused", "preempted", "drained", "lost", "crashed", "out_of_memory"
]
Lane = Literal["training", "cpu"]

JOB_STATUSES: Final = get_args(JobStatus)
TERMINAL: Final[frozenset[JobStatus]] = frozenset({"succeeded", "failed", "cancelled"})
UNFINISHED: Final = frozenset(JOB_STATUSES) - TERMINAL

# From -> to. Whoever writes a move must hold the lease (fence) where the from-state is a leased one.
TRANSITIONS: Final[frozenset[tuple[JobStatus, JobStatus]]] = frozenset(
    {
        ("validating_files", "queued"),
        ("validating_files", "failed"),
        ("validating_files", "cancelled"),
        ("validating_files", "succeeded"),  # a preflight: the check itself is the work
        ("queued", "running"),
        ("queued", "paused"),
        ("queued", "cancelled"),
        ("queued", "failed"),
        ("paused", "queued"),
        ("paused", "cancelled"),
        ("running", "queued"),  # lease lost, drained, preempted, crashed with attempts left
        ("running", "paused"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("running", "cancelled"),
    }
)

# Outcomes that use up one of a job's attempts; the others are nobody's fault.
COUNTED: Final[frozenset[AttemptOutcome]] = frozenset({"lost", "crashed", "failed"})


def is_terminal(status: JobStatus) -> bool:
    return status in TERMINAL


def may_move(before: JobStatus, after: JobStatus) -> bool:
    return (before, after) in TRANSITIONS
