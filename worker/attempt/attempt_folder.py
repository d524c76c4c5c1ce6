"""An attempt's place on one host: its folder, its device, what the trainer reads, and the trainer's start. No database.

Leader and members of a job on several hosts each have one; a job on one host has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from shared.contract.documents import Manifest
from shared.contract.passes import device_kind
from shared.contract.spec import AttemptSpec, DeviceKind
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, MeetingPlace
from shared.operating.isolation import Company
from shared.settle.wishes import wishes
from shared.settle.workload import keeps_copy
from worker import base_models
from worker.attempt import meeting
from worker.host.devices import CPU_SHARE, host_memory
from worker.host.host import Host
from worker.program import launcher, processes, workdir
from worker.program.launcher import Meeting, Trainer
from worker.program.memory_wall import Allowance, MemoryWall

log = structlog.get_logger()


class AttemptFolder:
    """Made with the claim; `prepare`, then `launch`."""

    def __init__(self, host: Host, claim: Claim) -> None:
        assert claim.spec is not None, "a queued job is resolved"
        self.host, self.claim, self.spec = host, claim, claim.spec
        self.tag = processes.own_tag(home=host.settings.home.resolve(), job_id=claim.lease.id, fence=claim.lease.fence)
        self.micro_batch_size = claim.micro_batch_size or self.spec.training.per_device_train_batch_size
        self.gradient_checkpointing = (
            self.spec.training.gradient_checkpointing
            if claim.gradient_checkpointing is None
            else claim.gradient_checkpointing
        )
        self.device = next(device for device in host.devices if claim.device_ids[0].endswith(f":{device.uuid}"))

    def make_folder(self) -> None:
        self.folder = workdir.make(self.host.work, self.claim.lease)

    def remove_folder(self) -> None:
        workdir.remove(self.host.work, self.claim.lease)

    # --- what the trainer reads -------------------------------------------------------------------------------------

    def prepare(self, interrupt: Callable[[], None]) -> list[NewEvent]:
        """Bring everything the trainer reads to this host; returns what there is to tell."""
        store, settings = self.host.store, self.host.settings
        entry = self.host.catalogue().entry(self.spec.base_model.name)
        self.model = base_models.ensure(
            entry, cache=settings.cache, interrupt=interrupt, user=self.folder.root, most=settings.cache_bytes
        )
        stage = partial(workdir.stage_rows, store, columns=self.spec.training.columns, interrupt=interrupt)
        rows = stage(self.claim.training_file, self.folder.data / "train.jsonl")
        validation = None
        if self.claim.validation_file is not None:
            validation = stage(self.claim.validation_file, self.folder.data / "validation.jsonl")
        events = self._stage_checkpoint(interrupt)
        self.folder.spec.write_text(
            self._attempt_spec(self.model, rows, validation).model_dump_json(), encoding="utf-8"
        )
        workdir.hand_over(self.folder, uid=self.host.trainer_uid)
        return events

    def _stage_checkpoint(self, interrupt: Callable[[], None]) -> list[NewEvent]:
        if self.claim.last_checkpoint is None:
            return []
        manifest = Manifest.read(self.claim.last_checkpoint)
        checkpoints = self.folder.out / "checkpoints"
        if workdir.stage_checkpoint(self.host.store, manifest, checkpoints, interrupt=interrupt):
            return [NewEvent(f"Resuming from the checkpoint of step {manifest.step}")]
        return [NewEvent("The last checkpoint is damaged; training starts from the beginning", level="warn")]

    def _attempt_spec(self, model: Path, rows: Path, validation: Path | None) -> AttemptSpec:
        return AttemptSpec(
            job_id=self.claim.lease.id,
            model_name=self.claim.model_name,
            job=self.spec,
            base_model_path=str(model),
            train_file=str(rows),
            validation_file=None if validation is None else str(validation),
            micro_batch_size=self.micro_batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            device=self.kind,
            cpu_threads=self._threads,
            memory_limit_bytes=self.device.total_bytes if self.kind == "cpu" else None,
            packing_asked="training.packing" in wishes(self.claim.request),
            keep_dequantized=keeps_copy(self.spec, device=self.kind, memory=self.device.total_bytes),
        )

    @property
    def kind(self) -> DeviceKind:
        return device_kind(self.device.kind)

    @property
    def _threads(self) -> int:
        """Threads of each rank: a CPU slot's cores, else a GPU's part of this worker's cores."""
        everything = self.host.settings.cpu_threads or len(os.sched_getaffinity(0))
        return self.device.cores or max(1, everything // len(self.host.devices))

    # --- the trainer ------------------------------------------------------------------------------------------------

    def launch(self, where: MeetingPlace | None = None, *, node: int = 0) -> Trainer:
        """Start the trainer on devices that nobody else is on: who is there without our lease has lost its own."""
        evicted = processes.kill_squatters(self.claim.device_ids, mine=self.tag)
        if evicted:
            log.warning("device.squatters_killed", pids=evicted, devices=list(self.claim.device_ids))
        settings = self.host.settings
        return launcher.start(
            launcher.command(
                settings.trainer,
                placement=self.spec.placement,
                spec_file=self.folder.spec,
                out=self.folder.out,
                meeting=None if where is None else Meeting(where.name, where.address, where.port, node),
                gang=settings.gang_launcher,
            ),
            environment=launcher.environment(
                tag=self.tag,
                device_ids=self.claim.device_ids,
                kind=self.device.kind,
                threads=self._threads,
                scratch=self.folder.out,
                interface=self._interface(where),
            ),
            tag=self.tag,
            out=self.folder.out,
            log_file=self.folder.log,
            uid=self.host.trainer_uid,
            isolation=self.host.isolation,
            company=self._company,
            reads=(self.folder.root, self.model),
            home=settings.home.resolve(),
        )

    def memory_wall(self) -> MemoryWall:
        """What bounds the host's memory of the trainer: all that its devices are, or its part of a host with GPUs."""
        ours = len(self.claim.device_ids)
        offered = self.device.total_bytes * ours
        if self.kind == "cpu":
            return MemoryWall(Allowance(share=offered, most=offered), memory=host_memory)
        total, _ = host_memory()
        return MemoryWall(Allowance(share=int(total * CPU_SHARE) * ours // len(self.host.devices)), memory=host_memory)

    @property
    def _company(self) -> Company:
        if self.spec.placement.nodes > 1:
            return "ranks_elsewhere"
        return "alone" if self.spec.placement.strategy == "single" else "ranks_here"

    def _interface(self, where: MeetingPlace | None) -> str | None:
        """Through which interface the ranks talk; on one host it is the only one that they have."""
        if where is not None:
            return meeting.interface(meeting.own_address(self.host.settings))
        return "lo" if self._company == "ranks_here" else None
