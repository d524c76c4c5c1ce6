"""The CPU lane: reads uploaded files, and settles jobs whose files are read. Short work that needs no device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, TypeVar

import structlog
from sqlalchemy.orm import Session

from shared.chores import cold_jobs, file_checks
from shared.chores.file_checks import FILE_CHECK, TABLES, FileCheck, MadeRows
from shared.chores.preflights import PreflightClaim
from shared.contract.job_request import chosen
from shared.contract.passes import device_kind
from shared.contract.spec import DataFacts
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.jobs import measurements, moves, settled_anew
from shared.jobs.claims import SETTLING
from shared.lease.journal import NewEvent
from shared.lease.values import Claim, FileRef
from shared.rows.check import DatasetReport, Limits, check, read_report
from shared.settle import common_ground, device_fit, durations, going_on
from shared.settle.resolve import Resolution, resolve
from shared.settle.settling import DeviceFacts
from shared.store.bell import ring
from shared.tenants.plain_text import printable
from worker import base_models
from worker.chores.row_reading import refuse_bad_rows
from worker.chores.run_program import LeaseWatch, Stopped, under_lease
from worker.chores.unpacking import checking_seconds, unpack
from worker.host.found_device import FoundDevice
from worker.host.host import Host

log = structlog.get_logger()

PROBLEMS_SHOWN: Final = 20
Param = Literal["training_file", "validation_file"]
AnyClaim = TypeVar("AnyClaim", Claim, PreflightClaim)


def check_next_file(host: Host) -> bool:
    """Read one uploaded file of lines, if any waits. False: none does, or the store is away."""
    return _check(host, host.claim(partial(file_checks.claim_check, **_who(host))))


def check_next_table(host: Host) -> bool:
    """Open one uploaded table, if any waits and long work may begin. False: none does, or the store is away."""
    turn = host.turn("table_check")
    file_check = host.claim(partial(file_checks.claim_check, **_who(host), work=TABLES, turn=turn))
    if file_check is not None:
        host.served["table_check"] = file_check.project_id
    return _check(host, file_check)


def _who(host: Host) -> dict[str, Any]:
    return {"worker_id": host.worker.id, "lease_seconds": host.settings.lease_seconds}


def _check(host: Host, file_check: FileCheck | None) -> bool:
    if file_check is None:
        return False
    return under_lease(host, FILE_CHECK, file_check.lease, partial(_report, host, file_check))


def _report(host: Host, file_check: FileCheck, watch: LeaseWatch) -> None:
    """Write what is in the file. Raises Stopped, too when the store is away: that is not the file's fault."""
    try:
        report, rows = _read(host, file_check, watch)
    except Unavailable as error:
        log.warning("file.unreadable", file_id=file_check.lease.id, error=str(error)[:200])
        raise Stopped from error  # the sweep rings again
    problem = listed(report) if report.problem_count else None
    document = report.document()
    host.write_in_the_end(
        lambda s: file_checks.finish_check(s, file_check, report=document, problem=problem, rows=rows)
    )
    log.info("file.checked", file_id=file_check.lease.id, rows=report.rows, problems=report.problem_count)


def _read(host: Host, file_check: FileCheck, watch: LeaseWatch) -> tuple[DatasetReport, MadeRows | None]:
    """What is in the file, and the rows made of it if it is not JSONL. Raises Unavailable, Stopped."""
    limits = _limits(host, size=file_check.bytes)
    if not file_check.packed:
        return check(_kept_alive(host, file_check.key, watch), limits=limits), None
    return unpack(host, file_check, watch, limits=limits)


def _limits(host: Host, *, size: int) -> Limits:
    """What the check of so many bytes may take. Every check of a file has its time by its size, under any names."""
    return Limits(file_bytes=host.settings.max_file_bytes, seconds=checking_seconds(size))


def _kept_alive(host: Host, key: str, watch: LeaseWatch) -> Iterator[bytes]:
    """The file's bytes; the lease of the check is extended while they flow. Raises Stopped."""
    for chunk in _small(host.store.chunks(key)):
        yield chunk
        watch.check()


def _small(chunks: Iterator[bytes], *, size: int = 64 * 1024) -> Iterator[bytes]:
    """The same bytes in pieces that are checked within a fraction of a second."""
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def listed(report: DatasetReport) -> str:
    """What is wrong with the file: the first problems, each by line and column."""
    shown = [str(problem) for problem in report.problems[:PROBLEMS_SHOWN]]
    more = report.problem_count - len(shown)
    text = "\n".join(shown) + (f"\n… and {more} more" if more > 0 else "")
    if report.stopped_at is None:
        return text
    return f"{text}; what follows {report.problems[0].unit} {report.stopped_at} was not read"


def validate_next_job(host: Host) -> bool:
    """Settle one job whose files are read: into the queue, or failed with its reasons. False: none waits."""
    lacking = base_models.not_here(host.catalogue())
    claim = host.claim(partial(moves.claim_validation, **_who(host), lacking=lacking))
    return claim is not None and under_lease(host, SETTLING.kind, claim.lease, partial(_validate, host, claim))


def _validate(host: Host, claim: Claim, watch: LeaseWatch) -> None:
    try:
        claim = read_as_asked(host, claim, watch)
    except Unavailable as error:  # the store is away: the sweep rings again
        raise Stopped from error
    try:
        device = offered_device(host)
        settled = settle(host, claim, device=device)
        refuse_bad_rows(host, claim, settled.spec, watch)
    except TunepoolError as error:
        code, message, param = error.code, error.message, error.param
        host.write_in_the_end(lambda s: moves.fail(s, claim.lease, code=code, message=message, param=param))
        log.info("job.refused", job_id=claim.lease.id, code=code)
        return
    if host.write_in_the_end(partial(_queue, claim, settled, device=device)):
        ring("cpu", host.settings)
    ring("training", host.settings)


def _queue(claim: Claim, settled: Resolution, session: Session, *, device: DeviceFacts) -> int:
    """Queue a settled job. Returns how many hosts are to fetch its base model before it can start."""
    moved = moves.validated(
        session,
        claim.lease,
        spec=settled.spec,
        auto=settled.auto,
        bytes_per_device=settled.bytes_per_device,
        needs=device_fit.needs(settled.spec, device),
        settled_for=settled_anew.noted(device),
        ground=common_ground.ground(settled),
        expected_seconds=durations.held_seconds(
            settled.spec, ended=measurements.held(session, base_model=settled.spec.base_model.name)
        ),
        events=list(oddities(claim)),
    )
    return cold_jobs.call_for(session, claim.lease.id) if moved else 0


def oddities(claim: Claim) -> Iterator[NewEvent]:
    """What the checks of the job's files warn of: dropped columns, conversions and the like, each counted."""
    if claim.validation_file is not None and claim.validation_file.sha256 == claim.training_file.sha256:
        yield NewEvent(
            "validation_file holds the same bytes as training_file: its loss says nothing of rows that are new to the "
            "model. Hold some rows back.",
            level="warn",
            data={"code": "validation_is_training"},
        )
    for param, file in (("training_file", claim.training_file), ("validation_file", claim.validation_file)):
        if file is None or file.report is None:
            continue
        for warning in read_report(file.report).warnings:
            text = printable(f"{param} '{file.id}': {warning.message} ({warning.rows:,} rows)")
            yield NewEvent(text, level="warn", data={"code": warning.code, "line": warning.line, "rows": warning.rows})


def read_as_asked(host: Host, claim: AnyClaim, watch: LeaseWatch) -> AnyClaim:
    """The claim with its files' rows checked under the names of `training.columns`, where it has some.

    Raises Stopped, Unavailable.
    """
    columns = chosen(claim.request.tunepool.training).get("columns")
    if not columns:
        return claim

    def read(file: FileRef) -> FileRef:
        if file.report is None:
            return file
        before = read_report(file.report)
        report = check(
            _kept_alive(host, file.key, watch),
            limits=_limits(host, size=host.store.size(file.key)),  # rows made of a table are more bytes than it
            made_of=before.made_of,
            left=before.left,
            cells=before.cells,
            columns=columns,
        )
        return replace(file, report=report.document())

    validation = None if claim.validation_file is None else read(claim.validation_file)
    return replace(claim, training_file=read(claim.training_file), validation_file=validation)


def settle(host: Host, claim: Claim | PreflightClaim, *, device: DeviceFacts) -> Resolution:
    """Every value of the job, or the reason why it cannot run. Raises Invalid and its kin."""
    training = _facts(claim.training_file, param="training_file", fewest=host.settings.min_training_rows)
    validation = claim.validation_file and _facts(claim.validation_file, param="validation_file", fewest=1)
    if validation and validation.format != training.format:
        raise Invalid(
            f"validation_file has format '{validation.format}', training_file '{training.format}'; use one.",
            param="validation_file",
            code="invalid_file_format",
        )
    assert training.format is not None, "rows without a problem have a format"
    data = DataFacts(
        format=training.format,
        train_rows=training.rows,
        validation_rows=validation.rows if validation else 0,
        mean_characters=training.characters / training.rows,
        max_characters=max(training.longest_row_characters, validation.longest_row_characters if validation else 0),
    )
    if claim.parent is None and going_on.is_marked(claim.request):
        raise going_on.parent_gone(claim.request.model)
    base = host.catalogue().find(claim.base_model)
    if claim.parent is not None:
        base = going_on.must_stand_on(claim.parent, base)
    return resolve(
        claim.request,
        base=base,
        data=data,
        device=device,
        seed=claim.seed,
        measurements=host.write(lambda s: measurements.of_kind(s, base_model=base.name)),
        parent=claim.parent,
    )


def _facts(file: FileRef, *, param: Param, fewest: int) -> DatasetReport:
    """The report of a file that passed its check. Raises Invalid."""
    if file.report is None:
        raise Invalid(f"{param} '{file.id}' could not be read.", param=param, code="invalid_file")
    report = read_report(file.report)
    if report.problem_count:
        message = f"{param} '{file.id}' has problems:\n{listed(report)}"
        raise Invalid(message, param=param, code=report.problems[0].code)
    if report.rows < fewest:
        raise Invalid(
            f"{param} '{file.id}' has {report.rows} rows; at least {fewest} are needed.",
            param=param,
            code="too_few_rows",
        )
    return report


def offered_device(host: Host) -> DeviceFacts:
    """What the pool offers a job at best; strangers' memory is not on offer, other jobs' is, once they end.

    A GPU offers what is free on it when no job is there: a driver, a desktop stay. Processes that keep all jobs away
    are expected to end, because nothing starts before they have.

    Raises Stopped where no known device could ever run a job, such as behind a driver that fails: then the job waits
    unsettled until one is.
    """
    best = host.write(lambda s: settled_anew.pool_offer(s, host.settings.pool)) or _own(host.devices[0])
    if not best.total_bytes:
        raise Stopped
    return best


def _own(device: FoundDevice) -> DeviceFacts:
    kind = device_kind(device.kind)
    free = device_fit.offered(kind, total=device.total_bytes, free=device.free_bytes, foreign=device.foreign_bytes)
    return DeviceFacts(kind=kind, total_bytes=device.total_bytes, free_bytes=free, bfloat16=device.bfloat16)
