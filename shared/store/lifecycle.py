"""The states of a job and of an attempt. Pure; docs/lifecycle.md lists the moves between them."""

from __future__ import annotations

from typing import Final, Literal, get_args

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
# `submitted`: a cluster has it, and has not started it yet.
AttemptPhase = Literal["submitted", "leased", "staging", "training", "publishing"]
# Of a further host of an attempt on several; `ended`: nothing of it lives there.
MemberPhase = Literal["called", "staging", "ready", "training", "ended"]
AttemptOutcome = Literal[
    "succeeded", "failed", "cancelled", "paused", "preempted", "drained", "lost", "crashed", "out_of_memory"
]
Lane = Literal["training", "cpu"]

JOB_STATUSES: Final = get_args(JobStatus)
TERMINAL: Final[frozenset[JobStatus]] = frozenset({"succeeded", "failed", "cancelled"})
UNFINISHED: Final = frozenset(JOB_STATUSES) - TERMINAL

# Outcomes that use up one of a job's attempts; the others are nobody's fault.
COUNTED: Final[frozenset[AttemptOutcome]] = frozenset({"lost", "crashed", "failed"})


def is_terminal(status: JobStatus) -> bool:
    return status in TERMINAL
