"""Uploads that are tables, arrays or compressed: a program of its own turns them into rows, and may die of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError

from shared.chores.file_checks import FileCheck, MadeRows
from shared.contract.events import EXIT_DONE, Failed
from shared.rows.cells import TableColumns
from shared.rows.check import DatasetReport, Limits, check, refused
from shared.rows.convert import UnpackSpec
from shared.rows.lines import RowProblem, at_start
from shared.rows.log_lines import safe_words
from shared.store import layout
from shared.tenants import plain_text
from worker.chores import run_program
from worker.chores.run_program import LeaseWatch, TooSlow
from worker.host.host import Host
from worker.program import hostile_folder, workdir
from worker.program.launcher import Exit
from worker.program.workdir import Workdir

log = structlog.get_logger()

UNPACK: Final = "worker.program.unpack"
# Within the first a program starts on a busy host, and a small file that is compressed well brings its rows. Tables of
# half a gigabyte, the usual largest size, have ten minutes.
LEAST_SECONDS: Final = 90.0
BYTES_A_SECOND: Final = 1_000_000
CHECKED_A_SECOND: Final = 2_000_000
# Beyond the libraries' 80 MB. A file in one page takes twice its size, and as much address space again; what a small
# one unpacks to, page by page, takes the first. No file has more than the last.
LEAST_BYTES: Final = 512 * 1024**2
BYTES_A_BYTE: Final = 3
MOST_BYTES: Final = 2 * 1024**3
COLUMNS_BYTES: Final = 1 << 20
_PLACE: Final = re.compile(r"(line|row|item) ([0-9]{1,12})")


def unpacking_seconds(size: int) -> float:
    """How long an upload of so many bytes may take to open."""
    return LEAST_SECONDS + size / BYTES_A_SECOND


def checking_seconds(size: int) -> float:
    """How much of a processor's time the check of so many bytes of rows may take. Good rows take an eighth of it."""
    return LEAST_SECONDS + size / CHECKED_A_SECOND


def unpacking_bytes(size: int) -> int:
    """How much memory the program that opens it may gain."""
    return min(MOST_BYTES, LEAST_BYTES + BYTES_A_BYTE * size)


def unpack(
    host: Host, file_check: FileCheck, watch: LeaseWatch, *, limits: Limits
) -> tuple[DatasetReport, MadeRows | None]:
    """Make JSONL of an upload that is none as it stands, and check that; the report counts as the file does.

    Raises Stopped, Unavailable.
    """
    place = workdir.make(host.work, file_check.lease)
    problem = _open(host, file_check, place, watch=watch, limits=limits)
    if problem is not None:
        return refused(problem), None
    columns = _columns(place)
    if columns is None:
        return refused(_broken()), None
    rows = place.out / "rows.jsonl"
    with hostile_folder.opened(rows.parent, rows.name) as stream:
        limits = replace(limits, seconds=checking_seconds(os.fstat(stream.fileno()).st_size))
    report = check(_chunks(rows, watch), limits=limits, made_of=columns.unit, left=columns.dropped, cells=columns.cells)
    return report, _keep(host, file_check, rows)  # of a file in error, too: a job may read its columns by other names


def _open(host: Host, file_check: FileCheck, place: Workdir, *, watch: LeaseWatch, limits: Limits) -> RowProblem | None:
    """Run the program; what is wrong with the file, or None when its rows lie in `place.out`."""
    upload = place.data / "upload"
    host.store.get_file(file_check.key, upload)
    watch.check()
    wanted = UnpackSpec(
        file=str(upload),
        filename=file_check.filename,
        max_bytes=limits.file_bytes,
        memory_bytes=unpacking_bytes(file_check.bytes),
    )
    place.spec.write_text(wanted.model_dump_json(), encoding="utf-8")
    workdir.hand_over(place, uid=host.trainer_uid)
    seconds = unpacking_seconds(file_check.bytes)
    try:
        ended = run_program.run(host, UNPACK, lease=file_check.lease, place=place, watch=watch, seconds=seconds)
    except TooSlow:
        message = f"Opening the file took more than {seconds:.0f} seconds, which follow its size. Upload it as JSONL."
        return at_start("too_slow", message)
    return _problem(place, ended, file_check)


def _problem(place: Workdir, ended: Exit, file_check: FileCheck) -> RowProblem | None:
    if ended.code == EXIT_DONE and hostile_folder.holds(place.out, "rows.jsonl"):
        return None
    fault = run_program.users_fault(place, ended)
    if fault is None:
        log.warning(
            "unpack.broke", file_id=file_check.lease.id, exit=ended.code, last_words=safe_words(ended.last_words)
        )
        return _broken()
    return _as_problem(fault)


def _broken() -> RowProblem:
    return at_start(
        "unreadable_table",
        "The file ended the program that opens it: it is damaged, or asks for far too much memory."
        " Write it again, or upload JSONL.",
    )


def _as_problem(fault: Failed) -> RowProblem:
    place = _PLACE.fullmatch(fault.param or "")
    unit: Any = place.group(1) if place else "line"
    line = int(place.group(2)) if place else 1
    return RowProblem(line=line, column=None, param="file", code=fault.code, message=fault.message, unit=unit)


def _columns(place: Workdir) -> TableColumns | None:
    """The program's report on the file's columns; None if it cannot be read."""
    try:
        columns = TableColumns.model_validate_json(hostile_folder.read(place.out, "columns.json", most=COLUMNS_BYTES))
    except (FileNotFoundError, hostile_folder.Refused, ValidationError):
        return None
    return columns.model_copy(update={"dropped": [plain_text.printable(name) for name in columns.dropped]})


def _keep(host: Host, file_check: FileCheck, rows: Path) -> MadeRows:
    key = layout.rows_key(file_check.key, file_check.lease.fence)
    with hostile_folder.opened(rows.parent, rows.name) as stream:
        return MadeRows(key=key, sha256=host.store.put_open(key, stream).sha256)


def _chunks(file: Path, watch: LeaseWatch, *, size: int = 1 << 16) -> Iterator[bytes]:
    with hostile_folder.opened(file.parent, file.name) as stream:
        while chunk := stream.read(size):
            watch.check()
            yield chunk
