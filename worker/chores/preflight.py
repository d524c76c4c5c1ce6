"""The CPU lane's preflights: settle a job that is not submitted, have its rows read, put the answer together.

The program is started like a trainer: a process group of its own, no credentials, no network, files in, files out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError

from shared.chores import preflights
from shared.chores.preflights import PREFLIGHT, PreflightClaim
from shared.contract.documents import JobError
from shared.contract.events import EXIT_DONE, TokenReport
from shared.contract.passes import device_kind
from shared.contract.preflight_report import CheckedFile, DeviceFit, Memory, Report, Run, Time
from shared.contract.published import published_shape
from shared.contract.spec import JobSpec, PreflightSpec
from shared.errors import TunepoolError, Unavailable
from shared.fleet import workers
from shared.jobs import measurements, pages
from shared.lease.values import FileRef
from shared.plan.capacity import Abilities
from shared.products import servability
from shared.settle import durations
from shared.settle.cautions import cautions
from shared.settle.device_fit import Candidate, fits, needs
from shared.settle.resolve import Resolution
from shared.settle.sizing import estimate_evaluation
from shared.store.tables import DeviceRow
from worker import base_models
from worker.chores import run_program as programs
from worker.chores.checks import offered_device, read_as_asked, settle
from worker.chores.run_program import TooSlow, Watch, under_lease
from worker.host.host import Host
from worker.program import hostile_folder, workdir
from worker.program.launcher import Exit
from worker.program.workdir import Workdir

log = structlog.get_logger()

REPORT_BYTES: Final = 32 * 1024 * 1024


class NoAnswer(TunepoolError):
    """The program ended without a report, and not by the user's fault."""

    code = "preflight_failed"


def examine_next(host: Host) -> bool:
    """Answer one preflight, if any waits and long work may begin. False: none does, or none can be answered now."""
    claim = host.claim(
        partial(
            preflights.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            turn=host.turn("preflight"),
        )
    )
    if claim is None:
        return False
    host.served["preflight"] = claim.project_id
    return under_lease(host, PREFLIGHT, claim.lease, partial(_examine, host, claim))


def _examine(host: Host, claim: PreflightClaim, watch: Watch) -> None:
    """Write the answer, or why there is none. Raises Stopped."""
    try:
        report = _Examination(host, claim, watch).answer()
    except (Unavailable, NoAnswer) as error:
        code, message = error.code, error.message
        log.warning("preflight.unanswered", preflight_id=claim.lease.id, code=code, error=message[:200])
        host.write_in_the_end(lambda s: preflights.fail(s, claim, code=code, message=message))
        return
    host.write_in_the_end(lambda s: preflights.finish(s, claim, report.document()))
    log.info("preflight.answered", preflight_id=claim.lease.id, ok=report.ok)


class _Examination:
    """One preflight on its way to an answer."""

    def __init__(self, host: Host, claim: PreflightClaim, watch: Watch) -> None:
        self.host, self.claim, self.watch = host, claim, watch

    def answer(self) -> Report:
        """The whole report. What would make the job fail is an answer too. Raises Stopped, Unavailable, NoAnswer."""
        self.claim = read_as_asked(self.host, self.claim, self.watch)
        report = Report(ok=False, files=self.files(), refusal=None)
        try:
            device = offered_device(self.host)
            resolution = settle(self.host, self.claim, device=device)
            report = report.model_copy(update=self.settled(resolution, needs(resolution.spec, device)))
            tokens = self.read_rows(resolution.spec)
        except (Unavailable, NoAnswer):
            raise
        except TunepoolError as error:
            refusal = JobError(code=error.code, message=error.message, param=error.param)
            return report.model_copy(update={"refusal": refusal})
        # An empty pool says nothing against the job: then what this worker has counts.
        fits_somewhere = any(device.fits for device in report.devices) if report.devices else resolution.fits
        ok = _is_ok(tokens) and fits_somewhere
        return report.model_copy(update={"tokens": tokens, **self.run(resolution, tokens), "ok": ok})

    def files(self) -> dict[str, CheckedFile]:
        """What the check of each file has found."""
        named = {"training": self.claim.training_file, "validation": self.claim.validation_file}
        return {name: _file(file) for name, file in named.items() if file is not None}

    def settled(self, resolution: Resolution, needed: Abilities) -> dict[str, Any]:
        """The spec with its reasons, its memory, and where it fits."""
        spec, correction = resolution.spec, resolution.calibration
        known = self.host.write(lambda s: measurements.of_kind(s, base_model=spec.base_model.name))
        devices = self.host.write(lambda s: pages.devices(s, pool_name=self.host.settings.pool))
        total = resolution.estimate.total
        return {
            "spec": spec.model_dump(mode="json"),
            "auto": [choice.model_dump(mode="json") for choice in resolution.auto],
            "warnings": cautions(spec),
            "servable": servability.verdicts(published_shape(spec)),
            "memory": Memory(
                predicted_bytes=correction.expected(total),
                upper_bytes=correction.upper(total),
                evaluation_bytes=correction.expected(estimate_evaluation(resolution.work).total),
                sure=correction.sure,
                measurements=correction.count,
                terms=resolution.estimate.terms,
            ),
            "devices": [
                DeviceFit(**dataclasses.asdict(fit))
                for fit in fits(spec, [candidate(row) for row in devices], measurements=known, abilities=needed)
            ],
        }

    def run(self, resolution: Resolution, tokens: TokenReport) -> dict[str, Any]:
        """Steps, tokens and time of the whole run, from the rows as they are."""
        spec = resolution.spec
        left_out = tokens.training.empty.count
        rows = max(1, tokens.training.rows - left_out)
        per_epoch = -(-rows // spec.training.batch_size)
        steps = per_epoch * spec.training.num_train_epochs
        steps = steps if spec.training.max_steps is None else min(steps, spec.training.max_steps)
        total = tokens.training.kept_tokens * steps / per_epoch
        pool_name = self.host.settings.pool
        device = self.host.write(lambda s: workers.roomiest_device(s, pool_name=pool_name)) or self.host.devices[0]
        speeds = self.host.write(
            lambda s: measurements.speeds(
                s, base_model=spec.base_model.name, method=spec.adapter.method, device_name=device.name
            )
        )
        duration = durations.predict(spec, tokens=total, device_name=device.name, speeds=speeds)
        return {
            "run": Run(steps=steps, steps_per_epoch=per_epoch, rows=rows, tokens=round(total)),
            "time": None if duration is None else Time(device=device.name, **dataclasses.asdict(duration)),
        }

    # --- the program ----------------------------------------------------------------------------------------------

    def read_rows(self, spec: JobSpec) -> TokenReport:
        """Have the program read the rows. Raises Invalid and its kin for what would end the job, too."""
        place = workdir.make(self.host.work, self.claim.lease)
        model = self.stage(spec, place)
        return self.result(place, self.run_program(place, model))

    def stage(self, spec: JobSpec, place: Workdir) -> Path:
        """Bring what the program reads; returns where the base model lies."""
        entry = self.host.catalogue().entry(spec.base_model.name)
        settings = self.host.settings
        model = base_models.ensure(
            entry, cache=settings.cache, interrupt=self.watch.check, user=place.root, most=settings.cache_bytes
        )
        wanted = PreflightSpec(
            job=spec,
            base_model_path=str(model),
            train_file=self.stage_file(spec, self.claim.training_file, place.data / "train.jsonl"),
            validation_file=None
            if self.claim.validation_file is None
            else self.stage_file(spec, self.claim.validation_file, place.data / "validation.jsonl"),
            preview_rows=list(self.claim.preview_rows),
            processes=self.threads,
            memory_bytes=self.host.settings.preflight_memory_bytes,
        )
        place.spec.write_text(wanted.model_dump_json(), encoding="utf-8")
        workdir.hand_over(place, uid=self.host.trainer_uid)
        return model

    def stage_file(self, spec: JobSpec, file: FileRef, target: Path) -> str:
        columns = spec.training.columns
        return str(workdir.stage_rows(self.host.store, file, target, columns=columns, interrupt=self.watch.check))

    @property
    def threads(self) -> int:
        return min(4, self.host.settings.cpu_threads or os.cpu_count() or 1)

    def run_program(self, place: Workdir, model: Path) -> Exit:
        settings = self.host.settings
        try:
            return programs.run(
                self.host,
                settings.preflight,
                lease=self.claim.lease,
                place=place,
                watch=self.watch,
                seconds=settings.preflight_seconds,
                reads=(model,),
            )
        except TooSlow as error:
            raise NoAnswer(
                f"Reading the rows takes more than {settings.preflight_seconds:g} seconds."
                " A shorter file or a simpler chat template would do.",
                code="preflight_timeout",
            ) from error

    def result(self, place: Workdir, ended: Exit) -> TokenReport:
        if ended.code == EXIT_DONE:
            with contextlib.suppress(OSError, hostile_folder.Refused, ValidationError):
                return TokenReport.model_validate_json(
                    hostile_folder.read(place.out, "preflight.json", most=REPORT_BYTES)
                )
        fault = programs.users_fault(place, ended)
        if fault is not None:
            raise _Refused(fault.message, code=fault.code, param=fault.param)
        log.warning(
            "preflight.broke", preflight_id=self.claim.lease.id, exit=ended.code, last_words=ended.last_words[-2000:]
        )
        raise NoAnswer(f"The program that reads the rows ended unexpectedly (exit code {ended.code}).")


class _Refused(TunepoolError):
    """The job would end so, too."""


def _is_ok(tokens: TokenReport) -> bool:
    """Whether training would begin: no row is refused, and each file has something to learn from or to look at."""
    files = [file for file in (tokens.training, tokens.validation) if file is not None]
    return all(file.fault_count == 0 and file.kept_tokens > 0 for file in files)


def _file(file: FileRef) -> CheckedFile:
    return CheckedFile(id=file.id, **(file.report or {}))


def candidate(row: DeviceRow) -> Candidate:
    """A device of the pool, as the check of what fits reads it."""
    return Candidate(
        id=row.id,
        name=row.name,
        kind=device_kind(row.kind),
        total_bytes=row.total_bytes,
        free_bytes=row.free_bytes,
        foreign_bytes=row.foreign_bytes,
        bfloat16=row.bfloat16,
        usable=row.healthy and not row.quarantined,
        busy=row.leased_by is not None,
    )
