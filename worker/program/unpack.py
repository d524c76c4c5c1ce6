"""Opens a stranger's file that is not JSONL as it stands: `python -m worker.program.unpack SPEC OUT`.

It writes `OUT/rows.jsonl`, and `OUT/columns.json`: the columns of the rows, the columns that were left out, and the
meaning of the row numbers. The file's first bytes say what kind it is. A Parquet reader is much native code that
trusts lengths in the file. So it runs here, where only this process can be lost. Exit codes and `OUT/events.jsonl` are
the trainer's.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow as pa

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.errors import TunepoolError
from shared.rows.arrays import item_lines
from shared.rows.cells import Noted, RowRefused, TableColumns, csv_lines, table_lines
from shared.rows.check import DEFAULT_LIMITS
from shared.rows.convert import UnpackSpec
from shared.rows.kinds import HEAD_BYTES, Kind, kind_of, unpacked_name
from worker.program.columnar import BATCH_ROWS, Unreadable, arrow_rows, parquet_rows
from worker.program.inflate import inflate

CHUNK_BYTES: Final = 1 << 20
_TABLES: Final = ("parquet", "arrow", "delimited")


def main(spec_file: Path, out: Path) -> int:
    """Unpack one file and translate how it ends into an exit code."""
    out.mkdir(parents=True, exist_ok=True)
    spec = UnpackSpec.model_validate_json(spec_file.read_bytes())
    limit_memory(spec.memory_bytes)
    try:
        make_rows(spec, out)
    except RowRefused as refused:
        tell(out, code=refused.code, message=sentence(refused.reason), param=f"{refused.unit} {refused.line}")
        return EXIT_USER_FAULT
    except TunepoolError as error:
        tell(out, code=error.code, message=str(error))
        return EXIT_USER_FAULT
    except (MemoryError, pa.ArrowMemoryError):
        tell(out, code="table_too_large", message=too_large(spec))
        return EXIT_OUT_OF_MEMORY
    return EXIT_DONE


def sentence(reason: str) -> str:
    """A reason as a sentence of its own."""
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}."


def too_large(spec: UnpackSpec) -> str:
    """What the memory limit is, and how a file stays within it."""
    return (
        f"Opening the file takes more than {spec.memory_bytes >> 20:,} MiB of memory: a page of it, or {BATCH_ROWS} "
        "rows in a run, unpack to too much. Write smaller pages (data_page_size) and shorter cells, or upload JSONL."
    )


def tell(out: Path, **why: Any) -> None:
    """Append the one event that this program has: why it failed."""
    with (out / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(Failed(time=time.time(), **why).model_dump_json() + "\n")


def limit_memory(gain: int) -> None:
    """Let this process gain `gain` bytes, so that a decompression bomb ends in an error."""
    # Of pyarrow's allocators the others set a gigabyte aside at their first use.
    pa.set_memory_pool(pa.system_memory_pool())
    ceiling = psutil.Process().memory_full_info().data + gain
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


def make_rows(spec: UnpackSpec, out: Path) -> None:
    """Write the rows and what is known of their columns. Raises RowRefused, Unreadable, CannotInflate."""
    file, name = Path(spec.file), spec.filename
    kind = _kind(file, name)
    if kind in {"gzip", "zstd"}:
        inner = out / "inflated"
        inflate(file, inner, codec="gzip" if kind == "gzip" else "zstd", most=spec.max_bytes)
        file, name = inner, unpacked_name(name)
        kind = _kind(file, name)
    if kind not in _TABLES or not _all_written(kind, file, out, most=spec.max_bytes):
        write(lines_of(kind, file, partial(note, out)), out / "rows.jsonl", most=spec.max_bytes)


def _all_written(kind: Kind, file: Path, out: Path, *, most: int) -> bool:
    """Write the rows with all their columns, for jobs that read them under other names; False: that is too much."""
    try:
        write(_short(lines_of(kind, file, partial(note, out), others=True)), out / "rows.jsonl", most=most)
    except (MemoryError, pa.ArrowMemoryError):
        return False
    except Unreadable as error:
        if error.code != "file_too_large":
            raise
        return False
    return True


def _short(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines. Raises Unreadable for one that is longer than a row may be: it may be so for an idle column."""
    for line in lines:
        if len(line) > DEFAULT_LIMITS.line_bytes:
            raise Unreadable("A row is too long.", code="file_too_large")
        yield line


def _kind(file: Path, name: str) -> Kind:
    with file.open("rb") as stream:
        return kind_of(stream.read(HEAD_BYTES), filename=name)


def note(out: Path, columns: TableColumns) -> None:
    """Write which columns were read, once they are known."""
    (out / "columns.json").write_text(columns.model_dump_json(), encoding="utf-8")


def lines_of(kind: Kind, file: Path, noted: Noted, *, others: bool = False) -> Iterator[bytes]:
    """The file's rows as JSONL lines; with `others` tables bring columns that no rule asks for.

    Raises RowRefused, Unreadable.
    """
    if kind == "parquet":
        return table_lines(parquet_rows(file, noted, others=others))
    if kind == "arrow":
        return table_lines(arrow_rows(file, noted, others=others))
    if kind == "delimited":
        return csv_lines(_chunks(file), noted=noted, others=others)
    if kind == "array":
        noted(TableColumns(unit="item"))
        return item_lines(_chunks(file))
    if kind == "lines":
        noted(TableColumns())
        return _chunks(file)
    raise Unreadable("The file is compressed twice; compress it once.", code="wrong_file_type")


def write(lines: Iterable[bytes], target: Path, *, most: int) -> None:
    """Write lines to a file. Raises Unreadable, code `file_too_large`, past `most` bytes: small files may unpack so."""
    written = 0
    with target.open("wb") as sink:
        for line in lines:
            written += len(line)
            if written > most:
                message = f"The file unpacks to more than {most:,} bytes of rows; split it or remove rows."
                raise Unreadable(message, code="file_too_large")
            sink.write(line)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
