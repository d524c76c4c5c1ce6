"""A further host's part in an attempt that another worker leads: stage, say ready, run ranks, end when it is over.

It has no lease: it publishes nothing and moves no job. It writes on its own row, and reads there how it stands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import structlog
from sqlalchemy.orm import Session

from shared.contract.documents import error_document
from shared.contract.events import EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.errors import TunepoolError
from shared.fleet import members, workers
from shared.fleet.members import MemberAnswer
from shared.lease.values import MeetingPlace, Membership
from shared.operating import tracing
from shared.rows.log_lines import safe_words
from shared.store.lifecycle import MemberPhase
from worker.attempt.attempt_folder import AttemptFolder
from worker.attempt.member_trace import MemberTrace
from worker.host.host import AWAY, Host, host_code, host_sentence
from worker.program.launcher import Trainer
from worker.program.processes import StillAlive
from worker.program.trainer_events import EventTail

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.1
GRACE_SECONDS: Final = 1.0


class MemberReleased(Exception):  # an order, not an error
    """The attempt is over, or does without this host."""


def take_part(host: Host, part: Membership) -> None:
    """Play a member's part to its end. What goes wrong here is told to the leader, and named there."""
    lease, trace = part.claim.lease, MemberTrace(tracing.of_this_process(tracing.WORKER), part)
    names = {"job_id": lease.id, "attempt": lease.attempt, "node": part.node, **trace.log_fields}
    bound = log.bind(**names)
    bound.info("member.called", devices=list(part.claim.device_ids))
    with trace, structlog.contextvars.bound_contextvars(**names), MemberReporter(host, part) as reporter:
        member = _Member(host, part, reporter, trace)
        try:
            member.run()
        except MemberReleased:
            member.leave()
        except StillAlive as error:
            bound.error("member.undead", error=str(error))
            member.quarantine(str(error))
        except TunepoolError as error:
            member.leave(error=error_document(error.code, error.message, param=error.param))
        except AWAY as error:
            bound.error("member.unsaid", error=str(error)[:200])  # the leader hears the silence
        except OSError as error:
            bound.exception("member.broke")
            member.leave(error=error_document(host_code(error), host_sentence(error, host)))
        except Exception as error:  # noqa: BLE001  # the one place that stands around a member's part
            bound.exception("member.broke")
            member.leave(error=error_document("internal_error", f"an unexpected error ({type(error).__name__})"))
        finally:
            member.clean_up()
    bound.info("member.left")


class MemberReporter(threading.Thread):
    """Says every `control_seconds` that this member is there, and hears whether it is needed; stops with a `with`."""

    def __init__(self, host: Host, part: Membership, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="member-reporter", daemon=True)
        self._host = host
        self._part = part
        self._clock = clock
        self._over = threading.Event()
        self._word: MemberAnswer | None = MemberAnswer(None)
        self._heard = clock()
        self.phase: MemberPhase = "staging"

    def __enter__(self) -> MemberReporter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Say nothing more; the last word is another's."""
        self._over.set()
        self.join(15)

    def check(self) -> None:
        """Raise Dismissed if this member is needed no more. One that hears nothing outlasts a leader that does not."""
        settings = self._host.settings
        blind = self._clock() - self._heard > settings.blind_seconds + settings.stop_seconds
        if self._word is None or blind:
            raise MemberReleased

    @property
    def meeting(self) -> MeetingPlace | None:
        return None if self._word is None else self._word.place

    def run(self) -> None:
        while self._word is not None and not self._over.wait(self._host.settings.control_seconds):
            now = self._clock()
            try:
                self._word = self._host.write(self._report)
            except AWAY as error:
                log.warning("member.unheard", job_id=self._part.claim.lease.id, error=str(error)[:200])
                continue
            self._heard = now

    def _report(self, session: Session) -> MemberAnswer | None:
        return members.report(session, self._part, phase=self.phase, leaving=self._host.flags.draining)


class _Member:
    """What a member holds while it takes part."""

    def __init__(self, host: Host, part: Membership, reporter: MemberReporter, trace: MemberTrace) -> None:
        self.host, self.part, self.reporter, self.trace = host, part, reporter, trace
        self.place = AttemptFolder(host, part.claim, variables=trace.variables)
        self.trainer: Trainer | None = None

    def run(self) -> None:
        self.enter("staging")
        self.place.make_folder()
        self.place.prepare(self.reporter.check)
        self.enter("ready")
        where = self.wait_for_meeting()
        self.trainer = self.place.launch(where, node=self.part.node)
        self.enter("training")
        try:
            self.watch(self.trainer)
        except BaseException:
            self.trainer.end(grace_seconds=GRACE_SECONDS)  # before anybody hears that this host is free
            raise

    def enter(self, phase: MemberPhase) -> None:
        self.reporter.phase = phase
        self.trace.phase(phase)

    def wait_for_meeting(self) -> MeetingPlace:
        while (where := self.reporter.meeting) is None:
            self.reporter.check()
            time.sleep(LOOK_SECONDS)
        return where

    def watch(self, trainer: Trainer) -> None:
        """Stay beside the ranks until they end by themselves; raises Dismissed when they are to end."""
        wall = self.place.memory_wall()
        while trainer.poll() is None:
            self.reporter.check()
            if (held := wall.exceeded()) is not None:
                ended, failed = wall.end(trainer, held)
                self.leave(exit_code=ended.code, error=failed.model_dump(mode="json", exclude={"type", "time"}))
                return
            time.sleep(LOOK_SECONDS)
        ended = trainer.end(grace_seconds=0)
        log.info("member.ranks_ended", job_id=self.part.claim.lease.id, exit_code=ended.code)
        if ended.code:
            log.warning("trainer.failed", job_id=self.part.claim.lease.id, last_words=safe_words(ended.last_words))
        self.leave(exit_code=ended.code, error=self.last_words(ended.code))

    def last_words(self, code: int) -> dict[str, Any] | None:
        """What a rank here says is wrong; the leader does not see this host's files."""
        if code not in {EXIT_USER_FAULT, EXIT_OUT_OF_MEMORY}:
            return None
        failed = [event for event in EventTail(self.place.folder.events).read() if isinstance(event, Failed)]
        return failed[-1].model_dump(mode="json", exclude={"type", "time"}) if failed else None

    def leave(self, *, exit_code: int | None = None, error: dict[str, Any] | None = None) -> None:
        """Say that nothing lives here any more. Raises one of AWAY."""
        self.reporter.stop()
        self.trace.note_end(exit_code=exit_code, error=error)
        self.write_in_the_end(partial(members.end, part=self.part, exit_code=exit_code, error=error))

    def quarantine(self, message: str) -> None:
        """The devices are not free: nobody may have them before somebody has looked."""
        for device_id in self.part.claim.device_ids:
            self.write_in_the_end(partial(workers.set_quarantined, device_id=device_id, quarantined=True))
        self.reporter.stop()
        error = error_document("trainer_undead", message)
        self.trace.note_end(exit_code=None, error=error)
        self.write_in_the_end(partial(members.end, part=self.part, error=error))

    def write_in_the_end(self, verb: Callable[[Session], object]) -> None:
        """Run a write, again while Postgres is away; after a lease the leader has long heard the silence."""
        self.host.write_in_the_end(verb)

    def clean_up(self) -> None:
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.end(grace_seconds=0)
        self.place.remove_folder()
