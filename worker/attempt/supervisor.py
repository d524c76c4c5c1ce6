"""One attempt of a job, from its lease to its end: stage, launch, watch, publish, settle.

No session is open while it waits. Whatever happens, the trainer is proven dead before the lease is let go, and only the
commit that carries the manifest publishes anything.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, cast

import structlog

from shared.contract.events import (
    EXIT_DONE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_FAULT,
    CheckpointSaved,
    Failed,
    TrainerEvent,
)
from shared.errors import TunepoolError, Unavailable
from shared.fleet import members, workers
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.lease.values import NOTHING_NEW, Claim, MeetingPlace
from shared.rows.log_lines import safe_words
from shared.store.lifecycle import AttemptOutcome
from worker.attempt import meeting, rungs
from worker.attempt.keeper import AT_ONCE, GIVEN_BACK, Interrupted, LeaseKeeper, Wish
from worker.attempt.leader import GangFault
from worker.attempt.publishing import PublishingAttempt
from worker.host.host import AWAY, Host, full_sentence, host_code, host_sentence
from worker.program.launcher import Exit, Watched
from worker.program.memory_wall import MemoryWall
from worker.program.processes import StillAlive
from worker.program.spare import Spare
from worker.program.trainer_events import EventTail, client_event

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.1
TELL_SECONDS: Final = 1.0
# So many are told as they come: whoever submits a small job waits for its first step.
TOLD_SOON: Final = 8
CANCEL_GRACE_SECONDS: Final = 1.0
# A trainer that has a checkpoint to write gets `stop_seconds`; then TERM, and this much later KILL.
TERM_GRACE_SECONDS: Final = 5.0

# Less than this is left after a crash: the disk was full.
ROOM_BYTES: Final = 1024 * 1024

# Why a trainer did not end by itself.
Ending = Wish | Literal["timeout", "stalled"]


@dataclass(frozen=True, slots=True)
class TrainerEnd:
    """How the trainer came to its end: by itself (`why` is None), or because somebody wished so."""

    why: Ending | None
    exit: Exit


def run_attempt(
    host: Host, claim: Claim, *, spare: Spare | None = None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Carry a claimed job to the end of this attempt. Never raises: whatever goes wrong is written on the job.

    A `spare` of the job's device is the trainer, if it can be; it does not outlive the attempt.
    """
    carry(SupervisedAttempt(host, claim, spare=spare, clock=clock))


def carry(attempt: SupervisedAttempt) -> None:
    """Carry an attempt to its end. Never raises."""
    host, claim = attempt.host, attempt.claim
    names = {"job_id": claim.lease.id, "attempt": claim.lease.attempt, **attempt.trace.log_fields}
    bound = log.bind(**names)
    bound.info("attempt.claimed", devices=list(claim.device_ids))
    named = structlog.contextvars.bound_contextvars(**names)
    with attempt.trace, named, LeaseKeeper(host, claim.lease, attempt.gang) as keeper:
        attempt.keeper = keeper
        try:
            attempt.run()
        except Interrupted as order:
            attempt.end_as_ordered(order.wish)
        except Unavailable as error:
            attempt.give_back("crashed", code=error.code, message=error.message)
        except TunepoolError as error:
            attempt.fail(error.code, error.message, param=error.param)
        except StillAlive as error:
            # The device is not free, so the lease must not end: the reaper would be wrong too, an operator must look.
            bound.error("attempt.undead", error=str(error))
            attempt.quarantine(str(error))
        except AWAY as error:
            bound.error("attempt.unsaid", error=str(error)[:200])  # the reaper will say it
        except OSError as error:
            bound.exception("attempt.broke")
            attempt.give_back("crashed", code=host_code(error), message=host_sentence(error, host))
        except Exception as error:  # noqa: BLE001  # the one place that stands around an attempt
            bound.exception("attempt.broke")
            attempt.give_back(
                "crashed",
                code="internal_error",
                message=f"The worker hit an unexpected error ({type(error).__name__}).",
            )
        finally:
            attempt.clean_up()
    bound.info("attempt.ended")


class SupervisedAttempt(PublishingAttempt):
    """The course of an attempt and its end."""

    # --- the acts ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            ended = self.train()
        finally:
            self.place.let_spare_go()  # one that was not handed over
            self.dismiss()
        self.settle(ended)

    def train(self) -> TrainerEnd:
        """Everything up to the end of the trainer."""
        self.place.make_folder()
        self.record_phase("staging")
        self.unwritten += self.place.prepare(self.keeper.check)
        self.reach("after_staging")
        self.keeper.check()
        self.trainer = self.launch()
        self.reach("after_launch")
        try:
            self.record_phase("training")
            return self.watch(self.trainer)
        except BaseException:
            self.trainer.end(grace_seconds=0)  # before anybody settles anything: the device must be free first
            raise
        finally:
            self.tell_log(now=True)

    def launch(self) -> Watched:
        return self.place.launch(self.meet_members(), sink=self.keep_log(), interrupt=self.keeper.check)

    def memory_wall(self) -> MemoryWall:
        return self.place.memory_wall()

    def sharing(self) -> int:
        """How many jobs take turns on its device."""
        return 1

    def meet_members(self) -> MeetingPlace | None:
        """Wait until every host of the job is ready, and say where they meet; None on one host."""
        if not self.gang.members:
            return None
        while not self.gang.ready:
            self.keeper.check()
            time.sleep(LOOK_SECONDS)
        apart = any(member.host != self.host.worker.host for member in self.gang.members)
        place = meeting.choose(self.host.settings, self.lease, apart=apart)
        if not self.write_in_the_end(lambda s: members.meet(s, self.lease, place)):
            raise Interrupted("lost")
        return place

    def dismiss(self) -> None:
        """Have the members end, and wait until of none anything lives: their devices are let go with ours."""
        if not self.gang.members or self.keeper.lost:
            return
        self.keeper.dismissed()
        self.write_in_the_end(lambda s: members.dismiss(s, self.lease))
        until = time.monotonic() + self.patience
        while not (self.gang.gone or self.keeper.lost or time.monotonic() > until):
            time.sleep(LOOK_SECONDS)

    def watch(self, trainer: Watched) -> TrainerEnd:
        """Stay beside the trainer until nothing of it lives; tell what it tells."""
        tail, settings = EventTail(self.place.folder.events), self.host.settings
        begun, why, stop_at = self.clock(), cast("Ending | None", None), float("inf")
        wall = self.memory_wall()
        self.story.heard = begun
        runtime = self.spec.queue.max_runtime_seconds or float("inf")
        while trainer.poll() is None:
            self.hear(tail)
            self.tell()
            self.tell_log()
            wish = self.keeper.wish or ("timeout" if self.clock() - begun > runtime else None)
            if wish in AT_ONCE or self.clock() > stop_at:
                return TrainerEnd(
                    wish or why,
                    self.stop_and_drain(
                        trainer, tail, grace=CANCEL_GRACE_SECONDS if wish in AT_ONCE else TERM_GRACE_SECONDS
                    ),
                )
            if wish == "deserted" != why:  # our ranks miss the others, say so, and end
                why, stop_at = wish, self.clock() + TERM_GRACE_SECONDS
            elif wish is not None and why is None:
                stop_at = self.clock() + self.story.until_stopped(floor_seconds=settings.stop_seconds)
                why = wish
                trainer.ask_to_stop()
            if self.story.silence() > self.story.patience(
                factor=settings.stall_factor, floor_seconds=settings.stall_floor_seconds
            ):
                return TrainerEnd("stalled", trainer.abort())
            if (held := wall.exceeded()) is not None:
                ended, self.story.failed = wall.end(trainer, held)
                return TrainerEnd(None, ended)
            self.rest(stopping=why is not None)
        return TrainerEnd(why, self.stop_and_drain(trainer, tail, grace=0))

    def rest(self, *, stopping: bool) -> None:
        """A short sleep that an order cuts shorter; an order that is being obeyed no longer does."""
        if stopping:
            time.sleep(LOOK_SECONDS)
        else:
            self.keeper.alarm.wait(LOOK_SECONDS)

    def stop_and_drain(self, trainer: Watched, tail: EventTail, *, grace: float) -> Exit:
        """End the trainer and hear its last words."""
        done = trainer.end(grace_seconds=grace)
        while self.hear(tail):
            pass
        self.tell(now=True)
        log.info("trainer.ended", job_id=self.lease.id, exit_code=done.code, events_unreadable=tail.unreadable)
        return done

    def hear(self, tail: EventTail) -> int:
        """Take in what the trainer has written since; returns how many events."""
        events = list(tail.read())
        if tail.refused is not None:
            raise tail.refused
        for event in events:
            self.heard(event)
        self.unwritten += self.meter.admit([news for news in map(client_event, events) if news is not None])
        return len(events)

    def heard(self, event: TrainerEvent) -> None:
        self.story.hear(event)
        self.trace.hear(event)
        if isinstance(event, CheckpointSaved):
            self.uploads.append(self.uploader.submit(self.publish_checkpoint, event))

    def tell(self, *, now: bool = False) -> None:
        """Write what is not written yet, soon only once a second; while Postgres is away it waits here."""
        pause = TELL_SECONDS if self.tells >= TOLD_SOON else 0.0
        if not self.unwritten or not (now or self.clock() - self.written_at >= pause):
            return
        self.written_at, self.tells = self.clock(), self.tells + 1
        batch, progress = list(self.unwritten), self.story.progress()
        try:
            self.host.write(lambda s: moves.record(s, self.lease, batch, progress=progress, sharing=self.sharing()))
        except AWAY as error:
            log.warning("events.waiting", job_id=self.lease.id, waiting=len(batch), error=str(error)[:200])
            return
        self.unwritten.clear()

    # --- how it ends ------------------------------------------------------------------------------------------------

    def settle(self, ended: TrainerEnd) -> None:
        """Write on the job how the trainer ended; one that was asked to stop and finished instead has finished."""
        code, why = ended.exit.code, ended.why
        if code == EXIT_STOPPED and why is None:  # who ends a machine tells all its processes at once
            why = self.keeper.wish
        if why in AT_ONCE:
            self.end_as_ordered(why, exit_code=code)
        elif why == "stalled":
            self.give_back(
                "crashed",
                code="trainer_stalled",
                message="The trainer stopped making progress and was ended.",
                ended=ended,
            )
        elif code == EXIT_DONE and self.story.finished is not None:
            self.publish()
        elif code == EXIT_USER_FAULT and self.story.failed is not None:
            self.fail(self.story.failed.code, self.story.failed.message, param=self.story.failed.param, exit_code=code)
        elif code == EXIT_OUT_OF_MEMORY:
            self.shrink(ended, self.story.failed)
        elif code >= 0 and code != EXIT_STOPPED and (fault := self.gang.fault) is not None:
            self.settle_for(fault, ended)
        elif why is not None:
            self.wait_for_uploads()
            self.end_as_ordered(why, exit_code=code)
        elif self.disk_is_full():
            self.give_back("crashed", code="disk_full", message=full_sentence(self.host), ended=ended)
        else:
            self.give_back("crashed", code=ended.exit.crash_code, message=ended.exit.crash_sentence, ended=ended)

    def settle_for(self, fault: GangFault, ended: TrainerEnd) -> None:
        """Write on the job that another host of it is at fault; its ranks said what ours would have said."""
        failed = None if fault.error is None else Failed.model_validate({"time": 0.0, **fault.error})
        if fault.exit_code == EXIT_OUT_OF_MEMORY:
            self.shrink(ended, failed)
        elif fault.exit_code == EXIT_USER_FAULT and failed is not None:
            self.fail(failed.code, failed.message, param=failed.param, exit_code=EXIT_USER_FAULT)
        else:
            self.give_back("crashed", code=fault.code, message=fault.message, ended=ended)

    def disk_is_full(self) -> bool:
        """Whether the trainer had no room to write: it cannot say so itself, for that would take room."""
        return shutil.disk_usage(self.place.folder.root).free < ROOM_BYTES

    def end_as_ordered(self, why: Ending, *, exit_code: int | None = None) -> None:
        """End the attempt as ordered; the trainer is dead by now."""
        if why == "cancel":
            self.write_in_the_end(lambda s: moves.confirm_cancelled(s, self.lease, exit_code=exit_code))
        elif why in ("pause", "timeout"):
            if why == "timeout":
                limit = self.spec.queue.max_runtime_seconds
                self.unwritten.append(
                    NewEvent(f"max_runtime_seconds ({limit}) is used up; resume the job to go on", level="warn")
                )
                self.tell(now=True)
            if not self.write_in_the_end(lambda s: moves.confirm_paused(s, self.lease, exit_code=exit_code)):
                self.write_in_the_end(lambda s: moves.confirm_cancelled(s, self.lease, exit_code=exit_code))
        elif why == "deserted":
            fault = self.gang.fault
            assert fault is not None, "a fault is never taken back"
            self.give_back("crashed", code=fault.code, message=fault.message, exit_code=exit_code)
        elif why != "lost":
            outcome, sentence = GIVEN_BACK[why]
            self.give_back(outcome, code=outcome, message=sentence, exit_code=exit_code)

    def shrink(self, ended: TrainerEnd, failed: Failed | None) -> None:
        """Out of memory: the next attempt does with less, or the user hears the numbers."""
        code = failed.code if failed else "out_of_memory"
        rung = rungs.lower(
            self.spec,
            kind=self.place.kind,
            micro_batch_size=self.place.micro_batch_size,
            gradient_checkpointing=self.place.gradient_checkpointing,
            pass_tokens=self.claim.pass_tokens,
            recomputed=self.place.recomputed_layers,
        )
        if rung is None:
            words = rungs.out_of_room(
                self.spec, kind=self.place.kind, there=self.place.device.total_bytes, failed=failed
            )
            self.fail(code, words, exit_code=ended.exit.code)
        else:
            self.give_back("out_of_memory", code=code, message=rung.message, ended=ended, next_try=rung.next_try)

    def fail(self, code: str, message: str, *, param: str | None = None, exit_code: int | None = None) -> None:
        if not self.write_in_the_end(
            lambda s: moves.fail(s, self.lease, code=code, message=message, param=param, exit_code=exit_code)
        ):
            self.write_in_the_end(lambda s: moves.confirm_cancelled(s, self.lease, exit_code=exit_code))

    def give_back(
        self,
        outcome: AttemptOutcome,
        *,
        code: str,
        message: str,
        ended: TrainerEnd | None = None,
        exit_code: int | None = None,
        next_try: Mapping[str, Any] = NOTHING_NEW,
    ) -> None:
        if ended is not None:
            self.finish_uploads()
            exit_code = ended.exit.code
            log.warning("trainer.failed", job_id=self.lease.id, code=code, last_words=safe_words(ended.exit.last_words))
        self.write_in_the_end(
            lambda s: moves.give_back(
                s,
                self.lease,
                outcome=outcome,
                code=code,
                message=message,
                settings=self.host.settings,
                exit_code=exit_code,
                next_try=next_try,
            )
        )

    def quarantine(self, message: str) -> None:
        for device_id in self.claim.device_ids:
            self.write_in_the_end(partial(workers.set_quarantined, device_id=device_id, quarantined=True))
        self.give_back("crashed", code="trainer_undead", message=message)

    def clean_up(self) -> None:
        """Leave nothing: no process, no thread that uploads, no folder."""
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.end(grace_seconds=0)
        self.uploader.shutdown(wait=False, cancel_futures=True)
        self.place.remove_folder()
        self.hand_over_log()
