"""What a dispatcher asks of a cluster, whichever it is. Values and one protocol; nothing here connects to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


class EngineAway(Exception):  # a fact, named as one
    """The cluster did not answer, or not in words that can be read: what it has done is not known."""


class EngineRefused(Exception):
    """The cluster answered that it does not take this; its own words."""


class EngineUnusable(Exception):
    """This installation cannot ask the cluster at all: what is missing or wrong, for the operator."""


@dataclass(frozen=True, slots=True)
class ClusterJobRequest:
    """What a cluster is to run: one attempt, on one node."""

    name: str  # the attempt's: a second submission is found by it instead of doubled
    devices: int


@dataclass(frozen=True, slots=True)
class ClusterJobState:
    """One of our jobs as the cluster shows it."""

    id: str
    name: str
    waits: bool  # nothing of it runs yet
    words: str  # the cluster's own, for users and operators
    mark: str = ""  # what tells it from a later one, and from itself once it has changed


@dataclass(frozen=True, slots=True)
class ClusterJobEnd:
    """How a job ended that the cluster lists no more.

    `alive`: it still knows it. `unknown`: it says nothing. `taken`: its machine was wanted back. `ended`: it ended or
    was ended, and nobody took the attempt over.
    """

    kind: Literal["alive", "unknown", "taken", "ended"]
    words: str


class Engine(Protocol):
    """A cluster. Every call may raise EngineAway."""

    label: str  # what people call it

    def submit(self, order: ClusterJobRequest) -> str:
        """Have the attempt run; returns the cluster's id of it. Raises EngineRefused.

        After EngineAway it may have been taken all the same: look before it is submitted again.
        """
        ...

    def listed(self) -> list[ClusterJobState]:
        """Everything of ours that waits or runs there, in the order it was submitted."""
        ...

    def fate(self, name: str) -> ClusterJobEnd:
        """How the newest job of that name ended."""
        ...

    def withdraw(self, sight: ClusterJobState) -> None:
        """End it. One that is gone is no error; where `sight` waits, one that has begun meanwhile is left alone."""
        ...
