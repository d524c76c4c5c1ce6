"""The CPU lane: reads uploaded files, and settles jobs whose files are read. Short work that needs no device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, Literal

import structlog

from shared.chores import file_checks
from shared.chores.file_checks import FileCheck, MadeRows
from shared.chores.preflights import PreflightClaim
from shared.contract.spec import DataFacts
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.fleet import workers
from shared.jobs import measurements, moves
from shared.lease.values import Claim, FileRef
from shared.rows.check import DatasetReport, Limits, check
from shared.rows.convert import source_of
from shared.settle import durations
from shared.settle.catalogue import load_catalogue
from shared.settle.resolve import DeviceFacts, Resolution, resolve
from worker.chores.run_program import Stopped
from worker.chores.unpacking import unpack
from worker.host.host import Host

log = structlog.get_logger()

PROBLEMS_SHOWN: Final = 20
Param = Literal["training_file", "validation_file"]


def check_next_file(host: Host) -> bool:
    """Read one uploaded file, if any waits. False: none does."""
    found = host.write(lambda s: file_checks.claim_check(s, lease_seconds=host.settings.lease_seconds))
    if found is None:
        return False
    try:
        report, rows = _read(host, found)
    except (Unavailable, Stopped) as error:
        log.warning("file.unreadable", file_id=found.file_id, error=str(error)[:200])
        host.write(lambda s: file_checks.release_check(s, found))
        return False  # not the file's fault; the sweep rings again
    problem, found_out = _sentence(report), dataclasses.asdict(report)
    host.write(lambda s: file_checks.finish_check(s, found, report=found_out, problem=problem, rows=rows))
    log.info("file.checked", file_id=found.file_id, rows=report.rows, problems=report.problem_count)
    return True


def _read(host: Host, found: FileCheck) -> tuple[DatasetReport, MadeRows | None]:
    """What is in the file, and the rows made of it if it is not JSONL. Raises Unavailable, Stopped."""
    limits = Limits(file_bytes=host.settings.max_file_bytes)
    if source_of(found.filename) in {None, "jsonl"}:
        return check(_kept_alive(host, found), limits=limits), None
    return unpack(host, found, limits=limits)


def _kept_alive(host: Host, found: FileCheck, *, clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """The file's bytes; the lease of the check is extended while they flow."""
    extended = clock()
    for chunk in _small(host.store.chunks(found.key)):
        yield chunk
        if clock() - extended > host.settings.heartbeat_seconds:
            extended = clock()
            host.write(lambda s: file_checks.keep_check(s, found, lease_seconds=host.settings.lease_seconds))


def _small(chunks: Iterator[bytes], *, size: int = 64 * 1024) -> Iterator[bytes]:
    """The same bytes in pieces that are checked within a fraction of a second."""
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _sentence(report: DatasetReport) -> str | None:
    """What is wrong with the file, every problem by line and column; None when nothing is."""
    if not report.problem_count:
        return None
    shown = [str(problem) for problem in report.problems[:PROBLEMS_SHOWN]]
    more = report.problem_count - len(shown)
    return "\n".join(shown) + (f"\n… and {more} more" if more > 0 else "")


def validate_next_job(host: Host) -> bool:
    """Settle one job whose files are read: into the queue, or failed with its reasons. False: none waits."""
    claim = host.claim(
        partial(moves.claim_validation, worker_id=host.worker.id, lease_seconds=host.settings.lease_seconds)
    )
    if claim is None:
        return False
    try:
        settled = settle(host, claim)
    except TunepoolError as error:
        code, message, param = error.code, error.message, error.param
        host.write(lambda s: moves.fail(s, claim.lease, code=code, message=message, param=param))
        log.info("job.refused", job_id=claim.lease.job_id, code=code)
        return True
    host.write(
        lambda s: moves.validated(
            s,
            claim.lease,
            spec=settled.spec,
            auto=settled.auto,
            bytes_per_device=settled.bytes_per_device,
            expected_seconds=durations.held_seconds(
                settled.spec, ended=measurements.held(s, base_model=settled.spec.base_model.name)
            ),
        )
    )
    return True


def settle(host: Host, claim: Claim | PreflightClaim) -> Resolution:
    """Every value of the job, or the reason why it cannot run. Raises Invalid and its kin."""
    training = _facts(claim.training_file, param="training_file", fewest=host.settings.min_training_rows)
    validation = claim.validation_file and _facts(claim.validation_file, param="validation_file", fewest=1)
    if validation and validation["format"] != training["format"]:
        raise Invalid(
            f"validation_file has format '{validation['format']}', training_file '{training['format']}'; use one.",
            param="validation_file",
            code="invalid_file_format",
        )
    data = DataFacts(
        format=training["format"],
        train_rows=training["rows"],
        validation_rows=validation["rows"] if validation else 0,
        mean_characters=training["characters"] / training["rows"],
        max_characters=max(
            training["longest_row_characters"], validation["longest_row_characters"] if validation else 0
        ),
    )
    base = load_catalogue(host.settings).find(claim.base_model)
    return resolve(
        claim.request,
        base=base,
        data=data,
        device=_device(host),
        seed=claim.seed,
        measurements=host.write(lambda s: measurements.of_kind(s, base_model=base.name)),
    )


def _facts(file: FileRef, *, param: Param, fewest: int) -> dict[str, Any]:
    """The report of a file that passed its check. Raises Invalid."""
    report = file.report
    if report is None:
        raise Invalid(f"{param} '{file.id}' could not be read.", param=param, code="invalid_file")
    if report["problem_count"]:
        raise Invalid(
            f"{param} '{file.id}' has problems:\n{_listed(report)}", param=param, code=report["problems"][0]["code"]
        )
    if report["rows"] < fewest:
        raise Invalid(
            f"{param} '{file.id}' has {report['rows']} rows; at least {fewest} are needed.",
            param=param,
            code="too_few_rows",
        )
    return report


def _listed(report: dict[str, Any]) -> str:
    def place(problem: dict[str, Any]) -> str:
        return f"line {problem['line']}" + ("" if problem["column"] is None else f", column {problem['column']}")

    shown = [f"{place(problem)}: {problem['message']}" for problem in report["problems"][:PROBLEMS_SHOWN]]
    more = report["problem_count"] - len(shown)
    return "\n".join([*shown, *([f"… and {more} more"] if more > 0 else [])])


def _device(host: Host) -> DeviceFacts:
    """What the pool offers a job at best; strangers' memory is not on offer, other jobs' is, once they end."""
    best = host.write(lambda s: workers.roomiest_device(s, pool_name=host.settings.pool)) or host.devices[0]
    kind: Literal["cuda", "cpu"] = "cpu" if best.kind == "cpu" else "cuda"
    return DeviceFacts(
        kind=kind,
        total_bytes=best.total_bytes,
        free_bytes=best.total_bytes - best.foreign_bytes,
        bfloat16=best.bfloat16,
    )
