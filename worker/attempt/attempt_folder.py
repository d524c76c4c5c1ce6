"""An attempt's place on one host: its folder, its device, what the trainer reads, and the trainer's start. No database.

Leader and members of a job on several hosts each have one; a job on one host has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from shared.contract.documents import Manifest
from shared.contract.handover import Handover
from shared.contract.passes import device_kind
from shared.contract.spec import AttemptSpec, DeviceKind
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, MeetingPlace
from shared.operating.isolation import Company
from shared.products.adapters import StoredFile
from shared.settle import going_on
from shared.settle.wishes import wishes
from shared.settle.workload import keeps_copy
from shared.store.bell import ring
from worker import base_models
from worker.attempt import held_base, meeting
from worker.host import prepared_bases
from worker.host.devices import CPU_SHARE, host_memory
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.program import hostile_folder, kernels, launcher, processes, workdir
from worker.program.launcher import Meeting, Trainer
from worker.program.memory_wall import Allowance, MemoryWall
from worker.program.printed import LogSink
from worker.program.processes import Tag
from worker.program.spare import Spare, handed_over, within_walls

log = structlog.get_logger()

NOTHING_MORE: Final[Mapping[str, str]] = MappingProxyType({})


def needed_by_a_child(name: str) -> bool:
    """Whether a job that goes on from a tuned model reads this file of its directory: weights and their configs."""
    return name.endswith(".safetensors") or name in {
        "adapter_config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }


class AttemptFolder:
    """Made with the claim, and with a spare for it if there is one; `prepare`, then `launch`."""

    def __init__(
        self, host: Host, claim: Claim, spare: Spare | None = None, *, variables: Mapping[str, str] = NOTHING_MORE
    ) -> None:
        """`variables`: further variables of a trainer that is started here; a spare has its environment already."""
        assert claim.spec is not None, "a queued job is resolved"
        self.variables = variables
        self.host, self.claim, self.spec = host, claim, claim.spec
        self.spare = spare
        self.micro_batch_size = claim.micro_batch_size or self.spec.training.per_device_train_batch_size
        self.gradient_checkpointing = (
            self.spec.training.gradient_checkpointing
            if claim.gradient_checkpointing is None
            else claim.gradient_checkpointing
        )
        # What ran out of memory recomputes every layer, if it recomputes at all.
        named = self.spec.training.gradient_checkpointing_layers
        self.recomputed_layers = named if claim.gradient_checkpointing is None else None
        self.device = next(device for device in host.devices if claim.device_ids[0].endswith(f":{device.uuid}"))

    def make_folder(self) -> None:
        """A spare has its folder: the walls around it leave it no other."""
        if self.spare is None:
            self.folder = workdir.make(self.host.work, self.claim.lease)
        else:
            workdir.remove_earlier(self.host.work, self.claim.lease)
            self.folder = self.spare.folder

    def remove_folder(self) -> None:
        """What the trainer has compiled stays on this host; nothing of it lives any more."""
        if hasattr(self, "folder"):  # a full disk may have left us without
            kernels.keep(self.host.settings.home, self.claim.project_id, self.folder.out)
        workdir.remove(self.host.work, self.claim.lease)
        if self.spare is not None:
            hostile_folder.remove(self.spare.folder.root)

    @property
    def tag(self) -> Tag:
        """Of the trainer that this attempt starts, or of the spare that it has."""
        if self.spare is not None and self.spare.serves:
            return self.spare.tag
        lease = self.claim.lease
        return processes.own_tag(home=self.host.settings.home.resolve(), job_id=lease.id, fence=lease.fence)

    def let_spare_go(self) -> None:
        """End a spare that has not been handed over. Raises StillAlive."""
        if self.spare is not None:
            self.spare.end()

    # --- what the trainer reads -------------------------------------------------------------------------------------

    def prepare(self, interrupt: Callable[[], None]) -> list[NewEvent]:
        """Bring everything the trainer reads to this host; returns what there is to tell."""
        store, settings = self.host.store, self.host.settings
        entry = self.host.catalogue().entry(self.spec.base_model.name)
        self.model = base_models.ensure(
            entry, cache=settings.cache, interrupt=interrupt, user=self.folder.root, most=settings.cache_bytes
        )
        self.prepared = self._find_prepared(interrupt)
        if self.spare is not None:
            self.model, self.prepared = within_walls(
                self.spare, self.model, self.host.isolation, prepared=self.prepared
            )
        stage = partial(workdir.stage_rows, store, columns=self.spec.training.columns, interrupt=interrupt)
        rows = stage(self.claim.training_file, self.folder.data / "train.jsonl")
        validation = None
        if self.claim.validation_file is not None:
            validation = stage(self.claim.validation_file, self.folder.data / "validation.jsonl")
        self.parent = self._stage_parent(interrupt)
        events = self._stage_checkpoint(interrupt)
        self.folder.spec.write_text(
            self._attempt_spec(self.model, rows, validation).model_dump_json(), encoding="utf-8"
        )
        kernels.bring(settings.home, self.claim.project_id, self.folder.out)
        workdir.hand_over(self.folder, uid=self.host.trainer_uid)
        return events

    def _find_prepared(self, interrupt: Callable[[], None]) -> Path | None:
        """The base in the job's 4 bits, if this host has it; else the CPU lane is asked to make it."""
        form = held_base.form_for(self.host, self.spec, model=self.model, device=self.device)
        if form is None:
            return None
        if self.spare is not None and self.spare.held is not None:
            held = Path(self.spare.held.prepared_path)
            if held == form.folder(self.host.settings.cache):
                return held  # compared when it was loaded, and in use since
        prepared = prepared_bases.find(form, cache=self.host.settings.cache, user=self.folder.root, interrupt=interrupt)
        if prepared is None and prepared_bases.miss(form, home=self.host.settings.home):
            ring("cpu", self.host.settings)
        return prepared

    def _stage_parent(self, interrupt: Callable[[], None]) -> Path | None:
        """Bring the tuned model here that the job goes on from. Raises NotFound, DataChanged, Unavailable."""
        parent, stored = self.spec.parent, self.claim.parent
        if parent is None:
            return None
        if stored is None:
            raise going_on.parent_gone(parent.name)
        folder = self.folder.data / "parent"
        folder.mkdir()
        files = [  # with the hashes that the settled job names
            StoredFile(file.name, file.bytes, file.sha256, stored.keys[file.name])
            for file in parent.files
            if needed_by_a_child(file.name)
        ]
        workdir.stage_files(self.host.store, files, folder, interrupt=interrupt)
        return folder

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
            job=self.spec.dated(self.claim.created_at),
            base_model_path=str(model),
            train_file=str(rows),
            validation_file=None if validation is None else str(validation),
            prepared_path=None if self.prepared is None else str(self.prepared),
            parent_path=None if self.parent is None else str(self.parent),
            micro_batch_size=self.micro_batch_size,
            pass_tokens=self.claim.pass_tokens,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_checkpointing_layers=self.recomputed_layers,
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
        return threads_of(self.host, self.device)

    # --- the trainer ------------------------------------------------------------------------------------------------

    def launch(
        self,
        where: MeetingPlace | None = None,
        *,
        node: int = 0,
        sink: LogSink | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> Trainer:
        """Start the trainer on devices that nobody else is on: who is there without our lease has lost its own.

        A spare gets the work instead, if it takes it. `sink`: who keeps what it prints; else its first megabytes lie in
        the folder while that is there. Raises what `interrupt` raises, StillAlive, OSError.
        """
        evicted = processes.kill_squatters(self.claim.device_ids, mine=self.tag)
        if evicted:
            log.warning("device.squatters_killed", pids=evicted, devices=list(self.claim.device_ids))
        work = Handover(spec=str(self.folder.spec), out=str(self.folder.out))
        trainer = handed_over(self.spare, work, interrupt=interrupt)
        if trainer is None:
            return self._start(where, node, sink)
        if sink is not None:
            trainer.log_to(sink)
        return trainer

    def _start(self, where: MeetingPlace | None, node: int, sink: LogSink | None) -> Trainer:
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
            environment={**self._variables(where), **self.variables},
            tag=self.tag,
            out=self.folder.out,
            log_file=sink or self.folder.log,
            uid=self.host.trainer_uid,
            isolation=self.host.isolation,
            company=self._company,
            reads=(self.folder.root, self.model, *([] if self.prepared is None else [self.prepared])),
            home=settings.home.resolve(),
        )

    def _variables(self, where: MeetingPlace | None) -> dict[str, str]:
        ids, out = self.claim.device_ids, self.folder.out
        return trainer_variables(self.host, self.device, ids, self.tag, out, interface=self._interface(where))

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


def trainer_variables(
    host: Host, device: FoundDevice, device_ids: tuple[str, ...], tag: Tag, out: Path, *, interface: str | None = None
) -> dict[str, str]:
    """The environment of a trainer on these devices; `device` is the first. A spare gets the same."""
    return launcher.environment(
        tag=tag,
        device_ids=device_ids,
        kind=device.kind,
        threads=threads_of(host, device),
        scratch=out,
        interface=interface,
    )


def threads_of(host: Host, device: FoundDevice) -> int:
    """Threads of each rank: a CPU slot's cores, else a GPU's part of this worker's cores."""
    everything = host.settings.cpu_threads or len(os.sched_getaffinity(0))
    return device.cores or max(1, everything // len(host.devices))
