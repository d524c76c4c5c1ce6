"""What an attempt holds while it lasts, and how its checkpoints, its adapter and its metrics are published."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Final, TypeVar

import structlog
from sqlalchemy.orm import Session

from shared import failpoints
from shared.contract.documents import Manifest
from shared.contract.events import EXIT_DONE, CheckpointSaved, Finished
from shared.errors import Invalid, Unavailable
from shared.ids import new_id
from shared.jobs import metrics_file, moves, provenance
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, NewFile
from shared.operating import tracing
from shared.store import layout
from shared.store.lifecycle import AttemptPhase
from shared.tenants import signing_keys
from worker.attempt import log_upload, proof
from worker.attempt.attempt_folder import AttemptFolder
from worker.attempt.attempt_trace import AttemptTrace
from worker.attempt.keeper import AT_ONCE, Interrupted, LeaseKeeper
from worker.attempt.kept_log import KeptLog
from worker.attempt.leader import Gang
from worker.host.host import AWAY, Host
from worker.program import workdir
from worker.program.launcher import Watched
from worker.program.spare import Spare
from worker.program.trainer_events import EventsSoFar, Meter, metric_lines

log = structlog.get_logger()
T = TypeVar("T")

LOG_SECONDS: Final = 2.0  # between two tellings of what the trainer prints


class PublishingAttempt:
    """What an attempt holds while it lasts, its writes to the database, and how its products are published."""

    keeper: LeaseKeeper

    def __init__(
        self, host: Host, claim: Claim, *, spare: Spare | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert claim.spec is not None, "a queued job is resolved"
        self.host = host
        self.claim = claim
        self.lease = claim.lease
        self.spec = claim.spec
        self.clock = clock
        self.trace = AttemptTrace(tracing.of_this_process(tracing.WORKER), host, claim)
        self.place = AttemptFolder(host, claim, spare, variables=self.trace.variables)
        self.gang = Gang(claim.members, host.settings, clock=clock)
        self.story = EventsSoFar(clock)
        self.meter = Meter(clock=clock)
        self.unwritten: list[NewEvent] = []
        self.written_at, self.tells = clock(), 0
        self.uploader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self.uploads: list[Future[None]] = []
        self.trainer: Watched | None = None
        self.kept: KeptLog | None = None
        self.log_told_at = clock()

    def keep_log(self) -> KeptLog | None:
        """None: this host can keep none, such as on a full disk. The training goes on without."""
        try:
            self.kept = KeptLog(self.host.logs, self.lease.id, self.lease.fence)
        except OSError as error:
            log.warning("log.not_kept", job_id=self.lease.id, error=str(error)[:200])
        return self.kept

    def tell_log(self, *, now: bool = False) -> None:
        """Tell what the trainer printed, now and then. Nothing waits for it: what fails now is written later."""
        if self.kept is None or not (now or self.clock() - self.log_told_at >= LOG_SECONDS):
            return
        self.log_told_at = self.clock()
        try:
            log_upload.tell(self.host, self.kept, self.lease.id, self.lease.fence)
        except AWAY as error:
            log.warning("log.waiting", job_id=self.lease.id, error=str(error)[:200])

    def hand_over_log(self) -> None:
        """The attempt has ended: its log goes to the store, or stays on this host until that works."""
        if self.kept is not None:
            log_upload.hand_over(self.host, self.kept, self.lease.id, self.lease.fence)

    def publish_checkpoint(self, event: CheckpointSaved) -> None:
        """Upload and record one checkpoint; runs in the upload thread, one after the other."""
        out = self.place.folder.out
        try:
            manifest = workdir.publish_checkpoint(self.host.store, self.claim, out, event, interrupt=self.unless_over)
        except (Unavailable, FileNotFoundError, Interrupted) as error:
            log.warning("checkpoint.unpublished", job_id=self.lease.id, step=event.step, error=str(error)[:200])
            return
        self.reach("checkpoint_uploaded")
        metrics = event.model_dump(mode="json", exclude={"type", "time", "name", "save_seconds"}, exclude_none=True)
        self.write_in_the_end(
            lambda s: moves.record_checkpoint(
                s,
                self.lease,
                step=event.step,
                name=self.checkpoint_name(event.step),
                metrics=metrics,
                manifest=manifest.document(),
            )
        )

    def checkpoint_name(self, step: int) -> str:
        return f"{self.claim.model_name}:ckpt-step-{step}"

    def unless_over(self) -> None:
        """Raise Interrupted if nothing of this attempt can be published any more."""
        wish = self.keeper.wish
        if wish in AT_ONCE:
            raise Interrupted(wish)

    def wait_for_uploads(self) -> None:
        for upload in self.uploads:
            upload.result()

    def finish_uploads(self) -> None:
        """Wait for checkpoints that were whole when the trainer ended badly: the next attempt goes on from the last."""
        wait(self.uploads)

    def publish(self) -> None:
        """Upload the adapter and the metrics, then the one commit that makes them known."""
        finished = self.story.finished
        assert finished is not None
        self.record_phase("publishing")
        self.wait_for_uploads()
        manifest = workdir.publish_adapter(
            self.host.store, self.claim, self.place.folder.out / "adapter", interrupt=self.unless_over
        )
        result = self.publish_metrics()
        manifest = self.prove(manifest, result, finished)
        self.unless_over()
        self.reach("adapter_uploaded")
        published = self.write_in_the_end(partial(self.commit, manifest=manifest, result=result, finished=finished))
        self.reach("after_publish")
        if not published:  # a cancel came first, or the lease is gone
            self.write_in_the_end(lambda s: moves.confirm_cancelled(s, self.lease, exit_code=EXIT_DONE))

    def commit(self, session: Session, *, manifest: Manifest, result: NewFile, finished: Finished) -> bool:
        published = moves.succeed(
            session,
            self.lease,
            manifest=manifest.document(),
            result_file=result,
            trained_tokens=finished.trained_tokens,
            peak_bytes=finished.peak_memory_bytes,
            train_seconds=finished.train_seconds,
            reason=finished.published_reason,
        )
        self.reach("publish_before_commit")
        return published

    def prove(self, manifest: Manifest, result: NewFile, finished: Finished) -> Manifest:
        """The manifest with a signed statement of where the adapter comes from, where this installation has a key."""
        try:
            key = self.write_in_the_end(partial(signing_keys.current, settings=self.host.settings))
        except Invalid as error:
            log.error("adapter.unsigned", job_id=self.lease.id, code=error.code, error=error.message)
            unsigned = NewEvent(f"The adapter is published without a signature. {error.message}", level="warn")
            self.write_in_the_end(lambda s: moves.record(s, self.lease, [unsigned]))
            return manifest
        if key is None:
            return manifest
        run = proof.facts(self.place, self.claim, files=manifest.files, result=result, finished=finished)
        stated = self.write_in_the_end(lambda s: provenance.statement(s, self.lease, self.spec, run))
        scratch = self.place.folder.root / provenance.FILE_NAME
        entry = proof.put(
            self.host.store, key, stated, prefix=manifest.prefix, scratch=scratch, interrupt=self.unless_over
        )
        return manifest.model_copy(update={"files": (*manifest.files, entry)})

    def publish_metrics(self) -> NewFile:
        earlier = self.write_in_the_end(lambda s: metrics_file.recorded_metrics(s, self.lease.id))
        text = metrics_file.metrics_csv([*earlier, *metric_lines(self.place.folder.events)])
        key = layout.result_key(self.claim.project_id, self.lease.id, self.lease.fence)
        size, sha256 = workdir.publish_text(
            self.host.store, key, text, scratch=self.place.folder.root / "step_metrics.csv", interrupt=self.unless_over
        )
        return NewFile(
            id=new_id("file-"),
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            bytes=size,
            sha256=sha256,
            key=key,
        )

    def reach(self, edge: failpoints.Edge) -> None:
        failpoints.reach(edge, self.host.settings)

    def record_phase(self, phase: AttemptPhase) -> None:
        self.trace.phase(phase)
        self.write_in_the_end(lambda s: moves.set_phase(s, self.lease, phase))

    def write_in_the_end(self, verb: Callable[[Session], T]) -> T:
        """Run a write, again while Postgres is away; a lost lease makes it do nothing. Raises one of `AWAY`."""
        return self.host.write_in_the_end(verb, patience=self.patience)

    @property
    def patience(self) -> float:
        """Seconds without Postgres after which nothing more is to be said under this lease."""
        return self.host.settings.blind_seconds + self.host.settings.lease_seconds
