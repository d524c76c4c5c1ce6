"""The CPU lane's longer work: merges, combinations and exports. Stage, run the program, publish, under a lease."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from shared.chores import merges
from shared.chores.merges import MERGE, MergeClaim
from shared.chores.product_records import RETRY_AFTER, ProductRecords
from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.contract.merge_request import CreateCombination, CreateExport, CreateMerge, MergeSpec
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.settle.product_memory import estimate_combination, estimate_export, estimate_merge
from worker import base_models
from worker.chores import run_program as programs
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host import devices
from worker.host.host import Host
from worker.program import workdir
from worker.program.launcher import Exit
from worker.program.trainer_events import EventsSoFar, EventTail
from worker.program.workdir import Workdir

log = structlog.get_logger()

# A merge or an export goes through weights at tens of MB a second. Slowest is a combination by singular values: some
# seconds for each matrix of 30 MB, on a busy host more.
LEAST_SECONDS: Final = 1800.0
BYTES_A_SECOND: Final = 500_000


def making_seconds(size: int) -> float:
    """How long a product may take whose base and adapters have so many bytes."""
    return LEAST_SECONDS + size / BYTES_A_SECOND


class HostTooSmall(TunepoolError):
    """The work needs more memory than this host offers. Another one may have it."""

    code = "host_oom"


class HostMemoryTaken(TunepoolError):
    """The host has the memory, and others hold it now."""

    code = "host_memory_taken"


def make_next(host: Host) -> bool:
    """Make one merge or combination, if any waits and long work may begin. False: none does."""
    claim = host.claim(
        partial(
            merges.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            turn=host.turn("merge"),
        )
    )
    if claim is None:
        return False
    host.served["merge"] = claim.project_id
    log.info("merge.claimed", merge_id=claim.lease.id, attempt=claim.lease.attempt)
    return under_lease(host, MERGE, claim.lease, partial(make, merges.RECORDS, host, claim))


def make(records: ProductRecords, host: Host, claim: MergeClaim, watch: LeaseWatch) -> None:
    """Write the product, or why there is none. Raises Stopped."""
    try:
        _Work(records, host, claim, watch).run()
    except HostMemoryTaken as error:
        code, message = error.code, error.message
        host.write_in_the_end(lambda s: records.postpone(s, claim.lease, code=code, message=message))
    except (Unavailable, HostTooSmall) as error:
        code, message = error.code, error.message
        host.write_in_the_end(lambda s: records.give_back(s, claim.lease, code=code, message=message))
    except TunepoolError as error:
        code, message, param = error.code, error.message, error.param
        host.write_in_the_end(lambda s: records.fail(s, claim.lease, code=code, message=message, param=param))


class _Work:
    """One attempt at a product."""

    def __init__(self, records: ProductRecords, host: Host, claim: MergeClaim, watch: LeaseWatch) -> None:
        self.records = records
        self.host, self.claim, self.watch = host, claim, watch
        self.lease = claim.lease

    def run(self) -> None:
        self.find_room()
        folder = workdir.make(self.host.work, self.lease)
        model = self.stage(folder)
        workdir.hand_over(folder, uid=self.host.trainer_uid)
        ended = self.run_program(folder, model)
        if ended.code != EXIT_DONE:
            self.refuse(folder, ended)
            return
        prefix = self.records.place(self.claim.project_id, self.lease)
        manifest = workdir.publish_folder(self.host.store, folder.out / "product", prefix, interrupt=self.watch.check)
        done = self.host.write_in_the_end(lambda s: self.records.finish(s, self.lease, manifest=manifest.document()))
        log.info("merge.ended", merge_id=self.lease.id, published=done)

    def find_room(self) -> None:
        """Nothing is fetched for what cannot be made. Raises HostTooSmall, HostMemoryTaken."""
        needed = self.estimate
        if needed > self.offered:
            raise HostTooSmall(
                f"Out of memory: about {_gib(needed)} are needed, the host offers {_gib(self.offered)} to a merge. "
                "Ask for a larger host or TUNEPOOL_MERGE_MEMORY_BYTES, or use the adapter without merging it."
            )
        _, available = devices.host_memory()
        if needed > available:
            log.info("merge.postponed", merge_id=self.lease.id, needed=needed, available=available)
            raise HostMemoryTaken(
                f"About {_gib(needed)} are needed, of this host's memory {_gib(available)} are free now. It is tried "
                f"again after {RETRY_AFTER.seconds} seconds, as often as it takes."
            )

    @property
    def estimate(self) -> int:
        request, spec = self.claim.request, self.claim.spec
        if isinstance(request, CreateMerge):
            return estimate_merge(spec, dequantized=request.onto == "dequantized").total
        if isinstance(request, CreateExport):
            whole, dequantized = request.format == "gguf", request.onto == "dequantized"
            return estimate_export(spec, whole=whole, dequantized=dequantized).total
        kind, count = request.combination_type, len(request.adapters)
        return estimate_combination(spec, adapters=count, combination_type=kind).total

    @property
    def offered(self) -> int:
        total, _ = devices.host_memory()
        return self.host.settings.merge_memory_bytes or int(total * devices.CPU_SHARE)

    def stage(self, folder: Workdir) -> Path:
        """Bring base and adapters here and write the program's spec; returns where the base lies.

        Raises NotFound, Unavailable, Invalid.
        """
        sources = self.host.write(lambda s: merges.sources(s, self.claim))
        entry = self.host.catalogue().entry(self.claim.spec.base_model.name)
        if entry.ref.revision != self.claim.spec.base_model.revision:
            raise Invalid(
                f"The catalogue now has revision {entry.ref.revision} of {entry.ref.name}; this adapter was trained on "
                f"{self.claim.spec.base_model.revision}. Ask your administrator to offer that revision again.",
                param="adapter",
                code="base_model_changed",
            )
        settings = self.host.settings
        model = base_models.ensure(
            entry, cache=settings.cache, interrupt=self.watch.check, user=folder.root, most=settings.cache_bytes
        )
        places = []
        for number, source in enumerate(sources):
            places.append(folder.data / f"adapter-{number}")
            workdir.stage_files(self.host.store, source.adapter.files, places[-1], interrupt=self.watch.check)
        spec = MergeSpec(
            name=self.lease.id,
            request=self.claim.request,
            job=self.claim.spec,
            base_model_path=str(model),
            adapter_paths=[str(place) for place in places],
            cpu_threads=self.threads,
            memory_limit_bytes=self.offered,
        )
        folder.spec.write_text(spec.model_dump_json(), encoding="utf-8")
        return model

    @property
    def threads(self) -> int:
        return self.host.settings.cpu_threads or os.cpu_count() or 1

    def run_program(self, folder: Workdir, model: Path) -> Exit:
        settings = self.host.settings
        modules = {CreateMerge: settings.merger, CreateCombination: settings.combiner, CreateExport: settings.exporter}
        module = modules[type(self.claim.request)]
        weights = (*model.glob("*.safetensors"), *folder.data.rglob("*.safetensors"))
        return programs.run(
            self.host,
            module,
            lease=self.lease,
            place=folder,
            watch=self.watch,
            seconds=making_seconds(sum(file.stat().st_size for file in weights)),
            threads=self.threads,
            reads=(model,),
        )

    def refuse(self, folder: Workdir, ended: Exit) -> None:
        """The program made nothing: its own words, or what its end means."""
        failed = _failure(folder.events)
        if ended.code == EXIT_USER_FAULT and failed is not None:
            code, message, param = failed.code, failed.message, failed.param
            self.host.write_in_the_end(
                lambda s: self.records.fail(s, self.lease, code=code, message=message, param=param)
            )
            return
        if ended.code == EXIT_OUT_OF_MEMORY:
            code, message = "host_oom", self.out_of_room(failed)
        else:
            code = "trainer_crashed"
            message = (
                f"The program ended with code {ended.code}: {(ended.last_words.strip().splitlines() or ['-'])[-1]}"
            )
        log.error("merge.crashed", merge_id=self.lease.id, exit_code=ended.code)
        self.host.write_in_the_end(lambda s: self.records.give_back(s, self.lease, code=code, message=message[:500]))

    def out_of_room(self, failed: Failed | None) -> str:
        """The estimate against what was seen."""
        figures = [f"{_gib(self.estimate)} were estimated"]
        if failed is not None and failed.peak_memory_bytes is not None:
            figures.append(f"{_gib(failed.peak_memory_bytes)} were held when it failed")
        return f"Out of memory: {', '.join(figures)}; the host offers {_gib(self.offered)} to a merge."


def _failure(events: Path) -> Failed | None:
    """The failure that the program told of."""
    story = EventsSoFar(time.monotonic)
    for event in EventTail(events).read():
        story.hear(event)
    return story.failed


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
