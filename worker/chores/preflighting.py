"""The CPU lane's preflights: settle a job that is not submitted, have its rows read, put the answer together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog

from shared.chores import preflights
from shared.chores.preflights import PREFLIGHT, PreflightClaim
from shared.contract.documents import JobError
from shared.contract.events import TokenReport
from shared.contract.passes import device_kind
from shared.contract.preflight_report import CheckedFile, DeviceFit, Memory, Report, RowProgress, Run, Sample, Time
from shared.contract.published import published_shape
from shared.contract.spec import JobSpec
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
from worker.chores.checks import offered_device, read_as_asked, settle
from worker.chores.reading_progress import ReadingProgress
from worker.chores.row_reading import NoAnswer, RowReading
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host.host import AWAY, Host

log = structlog.get_logger()


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


def _examine(host: Host, claim: PreflightClaim, watch: LeaseWatch) -> None:
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

    def __init__(self, host: Host, claim: PreflightClaim, watch: LeaseWatch) -> None:
        self.host, self.claim, self.watch = host, claim, watch

    def answer(self) -> Report:
        """The whole report. What would make the job fail is an answer too. Raises Stopped, Unavailable, NoAnswer."""
        self.claim = read_as_asked(self.host, self.claim, self.watch)
        report = Report(ok=False, files=self.files(), refusal=None)
        try:
            device = offered_device(self.host)
            resolution = settle(self.host, self.claim, device=device)
            report = report.model_copy(update=self.settled(resolution, needs(resolution.spec, device)))
            self.answer_early(resolution, report)
            tokens = self.read_all(resolution)
        except (Unavailable, NoAnswer):
            raise
        except TunepoolError as error:
            refusal = JobError(code=error.code, message=error.message, param=error.param)
            return report.model_copy(update={"refusal": refusal})
        ok = _is_ok(tokens) and _fits_somewhere(report, resolution)
        rows, kept_tokens = tokens.training.rows - tokens.training.empty.count, tokens.training.kept_tokens
        run = self.run(resolution, report, rows=rows, kept_tokens=kept_tokens)
        return report.model_copy(update={"tokens": tokens, **run, "ok": ok})

    def answer_early(self, resolution: Resolution, settled: Report) -> None:
        """Write what some rows of a large training file say, before all are read. Raises Stopped, Unavailable."""
        of_rows = (self.claim.training_file.report or {}).get("rows") or 0
        tokens = RowReading(self.host, self.claim, self.watch).sample(resolution.spec)
        if tokens is None or not tokens.training.rows or not of_rows:
            return
        read, scale = tokens.training, of_rows / tokens.training.rows
        run = self.run(
            resolution,
            settled,
            rows=round((read.rows - read.empty.count) * scale),
            kept_tokens=round(read.kept_tokens * scale),
        )
        sample = Sample(
            rows=read.rows,
            of_rows=of_rows,
            ok=_is_ok(tokens) and _fits_somewhere(settled, resolution),
            mean_tokens=read.mean_tokens,
            p95_tokens=read.p95_tokens,
            longest_tokens=read.longest_tokens,
            truncated=read.truncated.count,
            left_out=read.empty.count,
            refused=read.fault_count,
            fault=read.faults[0].message if read.faults else None,
            memory=settled.memory,
            **run,
        )
        self.host.write_in_the_end(lambda s: preflights.note(s, self.claim, sample=sample.document()))
        log.info("preflight.sampled", preflight_id=self.claim.lease.id, rows=read.rows, ok=sample.ok)

    def read_all(self, resolution: Resolution) -> TokenReport:
        """What all rows say; the preflight tells meanwhile how far that is. Raises what RowReading.report raises."""
        files = [file for file in (self.claim.training_file, self.claim.validation_file) if file is not None]
        watch = ReadingProgress(
            self.watch,
            self.note_progress,
            staged_bytes=sum((file.report or {}).get("bytes") or file.bytes for file in files),
            rows=sum((file.report or {}).get("rows") or 0 for file in files),
        )
        reading = RowReading(self.host, self.claim, watch, preview_rows=self.claim.preview_rows)
        return reading.report(resolution.spec, on_begin=watch.at)

    def note_progress(self, progress: RowProgress) -> None:
        """Nothing hangs on it: a database that is away does not hold the reading up."""
        try:
            self.host.write(lambda s: preflights.note(s, self.claim, progress=progress.document()))
        except AWAY as error:
            log.warning("preflight.progress_unheard", preflight_id=self.claim.lease.id, error=str(error)[:200])

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

    def run(self, resolution: Resolution, settled: Report, *, rows: int, kept_tokens: int) -> dict[str, Any]:
        """Steps and tokens of the whole run, from the rows that teach something and the tokens of an epoch; its time.

        The time of the roomiest device, and by device of those where the job fits.
        """
        spec = resolution.spec
        rows = max(1, rows)
        per_epoch = -(-rows // spec.training.batch_size)
        steps = per_epoch * spec.training.num_train_epochs
        steps = steps if spec.training.max_steps is None else min(steps, spec.training.max_steps)
        total = kept_tokens * steps / per_epoch
        pool_name = self.host.settings.pool
        device = self.host.write(lambda s: workers.roomiest_device(s, pool_name=pool_name)) or self.host.devices[0]
        names = {device.name, *(fit.name for fit in settled.devices if fit.fits)}
        times = {name: self.time(spec, tokens=total, device_name=name) for name in names}
        return {
            "run": Run(steps=steps, steps_per_epoch=per_epoch, rows=rows, tokens=round(total)),
            "time": times[device.name],
            "devices": [_timed(fit, times) for fit in settled.devices],
        }

    def time(self, spec: JobSpec, *, tokens: float, device_name: str) -> Time | None:
        """That the training takes on such a device."""
        speeds = self.host.write(
            lambda s: measurements.speeds(
                s, base_model=spec.base_model.name, method=spec.adapter.method, device_name=device_name
            )
        )
        duration = durations.predict(spec, tokens=tokens, device_name=device_name, speeds=speeds)
        return None if duration is None else Time(device=device_name, **dataclasses.asdict(duration))


def _timed(fit: DeviceFit, times: Mapping[str, Time | None]) -> DeviceFit:
    return fit.model_copy(update={"time": times[fit.name]}) if fit.fits else fit


def _fits_somewhere(report: Report, resolution: Resolution) -> bool:
    """An empty pool says nothing against the job: then what this worker has counts."""
    return any(device.fits for device in report.devices) if report.devices else resolution.fits


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
