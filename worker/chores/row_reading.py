"""Rows read by the code that trains on them, in a program of its own: for preflights, and before a job is queued.

The program is started like a trainer: a process group of its own, no credentials, no network, files in, files out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from shared.chores.preflights import PreflightClaim
from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT, FileTokens, TokenReport
from shared.contract.spec import JobSpec, PreflightSpec
from shared.errors import Invalid, TunepoolError
from shared.lease.values import Claim, FileRef
from shared.rows.log_lines import safe_words
from worker import base_models
from worker.base_models import BaseModelUnavailable
from worker.chores import base_tokenizers, rows_known
from worker.chores import run_program as programs
from worker.chores.run_program import Checked, LeaseWatch, TooSlow
from worker.chores.sampling import stage_sample
from worker.host import devices
from worker.host.host import Host
from worker.program import hostile_folder, workdir
from worker.program.launcher import Exit
from worker.program.workdir import Workdir

log = structlog.get_logger()

REPORT_BYTES: Final = 32 * 1024 * 1024
# Within the first a program starts on a busy host, and gives up a slow template. Usual rows come 20 times as fast.
LEAST_SECONDS: Final = 240.0
BYTES_A_SECOND: Final = 100_000
MOST_PROCESSES: Final = 4
_READ_ALIKE: Final = "worker.train"  # the trainer whose reader this is; another one reads rows its own way


class NoAnswer(TunepoolError):
    """The program ended without a report, and not by the user's fault."""

    code = "preflight_failed"


class _Refused(TunepoolError):
    """The job would end so, too."""


def reading_seconds(size: int, *, most: float) -> float:
    """How long so many bytes of rows may take: a small file that takes long holds its place no longer than it must."""
    return min(most, LEAST_SECONDS + size / BYTES_A_SECOND)


def reading_processes(*, cores: int, available: int, each: int) -> int:
    """As many as the host has cores, and free memory should each take all it may; one in any case."""
    return max(1, min(MOST_PROCESSES, cores, available // each))


class RowReading:
    """The rows of one job or preflight on their way to a report."""

    def __init__(
        self, host: Host, claim: Claim | PreflightClaim, watch: Checked, *, preview_rows: Sequence[int] = ()
    ) -> None:
        self.host, self.claim, self.watch, self.preview_rows = host, claim, watch, preview_rows

    def report(self, spec: JobSpec, *, on_begin: Callable[[Workdir], None] = lambda place: None) -> TokenReport:
        """Have the program read the rows. Raises Invalid and its kin for what would end the job, too.

        `on_begin` hears of the folder in which the rows are staged and read.

        Raises Stopped, NoAnswer, Unavailable as well.
        """
        place = workdir.make(self.host.work, self.claim.lease)
        on_begin(place)
        model = self._model(spec, place)
        training = self._stage_file(spec, self.claim.training_file, place.data / "train.jsonl")
        file = self.claim.validation_file
        validation = None if file is None else self._stage_file(spec, file, place.data / "validation.jsonl")
        self._write_spec(spec, place, model, training=training, validation=validation)
        size = sum(Path(rows).stat().st_size for rows in (training, validation) if rows is not None)
        return self._result(place, self._run_program(place, model, size=size))

    def sample(self, spec: JobSpec) -> TokenReport | None:
        """What some rows of a large training file say; None where there is no sample of them.

        Whatever ends the program early is left for `report` to say. Raises Stopped, Unavailable.
        """
        if spec.training.columns:  # their check has read the whole file just now
            return None
        place = workdir.make(self.host.work, self.claim.lease)
        training = place.data / "train.jsonl"
        if not stage_sample(self.host.store, self.claim.training_file, training, interrupt=self.watch.check):
            return None
        model = self._model(spec, place)
        self._write_spec(spec, place, model, training=str(training), validation=None)
        try:
            return self._result(place, self._run_program(place, model, size=training.stat().st_size))
        except (NoAnswer, _Refused) as error:
            log.info("rows.no_sample", id=self.claim.lease.id, code=error.code, error=error.message[:200])
            return None

    def _model(self, spec: JobSpec, place: Workdir) -> Path:
        """Where what the base model reads rows with lies, on this host by now."""
        entry = self.host.catalogue().entry(spec.base_model.name)
        settings = self.host.settings
        return base_tokenizers.ensure(
            entry, cache=settings.cache, interrupt=self.watch.check, user=place.root, most=settings.cache_bytes
        )

    def _write_spec(self, spec: JobSpec, place: Workdir, model: Path, *, training: str, validation: str | None) -> None:
        wanted = PreflightSpec(
            job=spec.dated(self.claim.created_at if isinstance(self.claim, Claim) else None),
            base_model_path=str(model),
            train_file=training,
            validation_file=validation,
            preview_rows=list(self.preview_rows),
            processes=self.processes,
            memory_bytes=self.host.settings.preflight_memory_bytes,
        )
        place.spec.write_text(wanted.model_dump_json(), encoding="utf-8")
        workdir.hand_over(place, uid=self.host.trainer_uid)

    def _stage_file(self, spec: JobSpec, file: FileRef, target: Path) -> str:
        columns = spec.training.columns
        return str(workdir.stage_rows(self.host.store, file, target, columns=columns, interrupt=self.watch.check))

    @property
    def processes(self) -> int:
        settings, (_, available) = self.host.settings, devices.host_memory()
        cores = settings.cpu_threads or os.cpu_count() or 1
        return reading_processes(cores=cores, available=available, each=settings.preflight_memory_bytes)

    def _run_program(self, place: Workdir, model: Path, *, size: int) -> Exit:
        """`size`: bytes of the rows that it reads."""
        settings = self.host.settings
        seconds = reading_seconds(size, most=settings.preflight_seconds)
        try:
            return programs.run(
                self.host,
                settings.preflight,
                lease=self.claim.lease,
                place=place,
                watch=self.watch,
                seconds=seconds,
                reads=(model,),
            )
        except TooSlow as error:
            raise NoAnswer(
                f"Reading the rows takes more than {round(seconds, 1):g} seconds."
                " A shorter file or a simpler chat template would do.",
                code="preflight_timeout",
            ) from error

    def _result(self, place: Workdir, ended: Exit) -> TokenReport:
        if ended.code == EXIT_DONE:
            with contextlib.suppress(OSError, hostile_folder.Refused, ValidationError):
                return TokenReport.model_validate_json(
                    hostile_folder.read(place.out, "preflight.json", most=REPORT_BYTES)
                )
        fault = programs.users_fault(place, ended)
        if fault is not None:
            users = ended.code == EXIT_USER_FAULT
            raise (_Refused if users else _TooLarge)(fault.message, code=fault.code, param=fault.param)
        log.warning("rows.unread", id=self.claim.lease.id, exit=ended.code, last_words=safe_words(ended.last_words))
        raise NoAnswer(f"The program that reads the rows ended unexpectedly (exit code {ended.code}).")


class _TooLarge(_Refused):
    """The program was out of memory: a trainer may have more."""


def refuse_bad_rows(host: Host, claim: Claim, spec: JobSpec, watch: LeaseWatch) -> None:
    """Have the rows of a settled job read as its trainer will.

    What cannot be answered here stays for the trainer to say: where the base model's source is away or refuses this
    host, others may have it. Raises Invalid for rows that end the job, Stopped.
    """
    if host.settings.trainer != _READ_ALIKE:
        return
    mark = _mark(host, claim, spec)
    if mark is not None and mark.exists():  # the program would take longer than all the rest of a small job's start
        return
    try:
        _bring_base(host, spec, watch)
        report = RowReading(host, claim, watch).report(spec)
    except (NoAnswer, _TooLarge, BaseModelUnavailable) as error:
        log.warning("job.rows_unread", job_id=claim.lease.id, code=error.code, error=error.message[:200])
        return
    _refuse("training_file", claim.training_file, report.training, spec)
    if claim.validation_file is not None and report.validation is not None:
        _refuse("validation_file", claim.validation_file, report.validation, spec)
    if mark is not None:
        rows_known.remember(mark)


def _mark(host: Host, claim: Claim, spec: JobSpec) -> Path | None:
    """Where it is remembered that these rows are good; None where the base model is not here, which it rests on."""
    catalogue = host.catalogue()
    if spec.base_model.name not in base_models.cached_names(catalogue, cache=host.settings.cache):
        return None
    return rows_known.mark_of(host, claim, spec, catalogue.entry(spec.base_model.name))


def _bring_base(host: Host, spec: JobSpec, watch: LeaseWatch) -> None:
    """Raises BaseModelUnavailable, too where the source refuses it: that is no fault of the rows."""
    entry = host.catalogue().entry(spec.base_model.name)
    settings = host.settings
    try:
        base_tokenizers.ensure(entry, cache=settings.cache, interrupt=watch.check, most=settings.cache_bytes)
    except Invalid as error:
        raise BaseModelUnavailable(error.message) from error


def _refuse(param: str, file: FileRef, tokens: FileTokens, spec: JobSpec) -> None:
    if tokens.fault_count:
        first = tokens.faults[0]
        more = f" ({tokens.fault_count:,} rows are refused.)" if tokens.fault_count > 1 else ""
        message = f"{param} '{file.id}', row {first.row}: {first.message}{more}"
        raise Invalid(message, code=first.code, param=param)
    if not tokens.kept_tokens:
        raise Invalid(
            f"{param} '{file.id}': no row has a token to learn from: all {tokens.rows:,} rows are masked or were cut"
            f" before their answer by max_length {spec.training.max_length}.",
            code="no_trainable_tokens",
            param=param,
        )
