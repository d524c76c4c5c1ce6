"""The values that travel between the verbs of shared/jobs and the holder of a lease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import ColumnElement, func

from shared.contract.job_request import CreateJob
from shared.contract.parent_model import ParentModel
from shared.contract.spec import JobSpec
from shared.store.tables import FileRow


def ends_in(seconds: float) -> ColumnElement[datetime]:
    """When a lease of `seconds` ends that is taken by the statement at hand.

    Not `now()`, the start of the transaction: that may have waited for a lock since, and its lease would be short, or
    over before it is committed.
    """
    return func.clock_timestamp() + timedelta(seconds=seconds)


class WrittenByNewerVersion(Exception):  # a fact about a row, named as one
    """A row of work carries what only a newer version writes; a worker of that version takes it."""

    def __init__(self, row_id: str) -> None:
        super().__init__(row_id)
        self.row_id = row_id


@dataclass(frozen=True, slots=True)
class Lease:
    """Proof that `worker_id` works on the row `id` of a kind. Every write carries it; the fence only grows."""

    kind: str
    id: str
    fence: int
    worker_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class FileRef:
    id: str
    key: str
    bytes: int
    sha256: str
    report: dict[str, Any] | None

    @classmethod
    def of(cls, row: FileRow) -> FileRef:
        """What a job reads of this file: the rows that the check made of it, else the upload itself."""
        return cls(
            id=row.id,
            key=row.rows_key or row.key,
            bytes=row.bytes,
            sha256=row.rows_sha256 or row.sha256,
            report=row.report,
        )


@dataclass(frozen=True, slots=True)
class Member:
    """A further host of an attempt; the leader, which holds the lease, is node 0."""

    node: int
    worker_id: str
    host: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """What an attempt needs to know; read once, in the transaction that took the lease."""

    lease: Lease
    project_id: str
    request: CreateJob
    base_model: str
    seed: int
    spec: JobSpec | None
    model_name: str
    training_file: FileRef
    validation_file: FileRef | None
    device_ids: tuple[str, ...] = ()
    micro_batch_size: int | None = None
    pass_tokens: int | None = None  # packed tokens of a pass at most, after running out of memory
    gradient_checkpointing: bool | None = None
    last_checkpoint: dict[str, Any] | None = None
    members: tuple[Member, ...] = ()  # the further hosts of a job on several
    companions: tuple[Claim, ...] = ()  # the other jobs on its device, each with a lease of its own
    parent: ParentModel | None = None  # what it goes on from; None too when that is withdrawn
    parent_name: str | None = None
    traceparent: str | None = None  # of the request that made it
    created_at: datetime | None = None
    queued_at: datetime | None = None


# Columns of a job that change for its next attempt: none.
NOTHING_NEW: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Membership:
    """A member's part in an attempt: the leader's claim with this host's devices. Its lease is to read by only."""

    claim: Claim
    node: int


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """Where the hosts of one attempt meet. The name is random: a host of another attempt does not know it."""

    name: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What the holder of a lease must do next; the answer to its heartbeat."""

    cancel: bool = False
    pause: bool = False
    preempt: bool = False


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file that a job made; its bytes are in the store already."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    key: str
