"""The further hosts of an attempt, as its leader sees them. It is given rows and a clock, and reads no database."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shared.contract.documents import JobError
from shared.contract.events import EXIT_DONE, EXIT_STOPPED
from shared.fleet.members import MemberState
from shared.lease.values import Member
from shared.settings import Settings

SILENT_BEATS: Final = 3  # a member reports every second or so; after this many heartbeats without a word it is gone


@dataclass(frozen=True, slots=True)
class GangFault:
    """Why a gang is not whole any more."""

    code: str
    message: str
    exit_code: int | None = None
    error: dict[str, Any] | None = None


class Gang:
    """The members' last reports. A job on one host has no members: its gang counts as ready, and as gone."""

    def __init__(
        self, members: Sequence[Member], settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.members = tuple(members)
        self._settings = settings
        self._clock = clock
        self._listened = clock()
        self._states: dict[int, MemberState] = {}
        self._changed = {member.node: self._listened for member in members}
        self._silent: frozenset[int] = frozenset()

    def hear(self, states: Sequence[MemberState]) -> None:
        """Take in what the rows say now. Silence counts only while we could have heard."""
        now = self._clock()
        deaf = now - self._listened > self._patience("training") / 2
        self._listened = now
        for state in states:
            before = self._states.get(state.node)
            if deaf or before is None or state.heard_at != before.heard_at:
                self._changed[state.node] = now
        self._states = {state.node: state for state in states}
        self._silent = frozenset(
            state.node
            for state in states
            if state.phase != "ended" and now - self._changed[state.node] > self._patience(state.phase)
        )

    def _patience(self, phase: str) -> float:
        """Seconds that a member may be silent; a call may have to wait for the worker's next look by itself."""
        beats = SILENT_BEATS * self._settings.heartbeat_seconds
        return max(beats, self._settings.lease_seconds) if phase == "called" else beats

    @property
    def ready(self) -> bool:
        """Whether all have staged what they need."""
        states = [self._states.get(member.node) for member in self.members]
        return all(state is not None and state.phase == "ready" for state in states)

    @property
    def gone(self) -> bool:
        """Whether of no member anything lives, as far as anybody can know."""
        states = [self._states.get(member.node) for member in self.members]
        return all(
            state is not None and (state.phase == "ended" or state.node in self._silent or state.phase == "called")
            for state in states
        )

    @property
    def leaving(self) -> bool:
        """Whether the worker of a member shuts down."""
        return any(state.leaving for state in self._states.values())

    @property
    def fault(self) -> GangFault | None:
        """The first member that is not there any more although it is needed, and why; the plainest cause first."""
        faults = [fault for state in self._states.values() if (fault := self._fault(state)) is not None]
        return min(faults, key=_plainness, default=None)

    def _fault(self, state: MemberState) -> GangFault | None:
        where = f"Host {state.host}, a member of this job's gang,"
        if state.node in self._silent:
            what = "did not answer the call" if state.phase == "called" else "stopped answering"
            return GangFault("member_lost", f"{where} {what}.")
        if state.phase != "ended" or (state.error is None and state.exit_code in (EXIT_DONE, EXIT_STOPPED, None)):
            return None
        if state.error is not None:
            error = JobError.read(state.error)
            sentence = f"{where} had to stop: {error.message.rstrip('.')}."
            return GangFault(error.code, sentence, state.exit_code, state.error)
        assert state.exit_code is not None
        code = "trainer_killed" if state.exit_code == -signal.SIGKILL else "trainer_crashed"
        return GangFault(code, f"{where} lost its trainer: it ended with {_how(state.exit_code)}.", state.exit_code)


def _plainness(fault: GangFault) -> tuple[bool, bool]:
    """Words and signals name a cause; an exit code of 1 is what ranks end with when those of another host are gone."""
    return fault.error is None, fault.exit_code is not None and fault.exit_code > 0


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
