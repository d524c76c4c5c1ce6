"""Opens a stranger's CSV or Parquet file: `python -m worker.program.unpack SPEC OUT` writes `OUT/rows.jsonl`,
and `OUT/columns.json`: which columns the rows have, and which were left out.

A Parquet reader is much native code that trusts lengths in the file, so it runs here, where nothing can be lost but
this process. Exit codes and `OUT/events.jsonl` are the trainer's.
"""

from __future__ import annotations

import io
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.errors import TunepoolError
from shared.rows.cells import Noted, RowRefused, TableColumns, chosen, csv_lines, table_lines
from shared.rows.convert import UnpackSpec
from shared.rows.lines import FileRefused

# A cell of a few bytes in the file may be megabytes, as dictionaries and run lengths repeat them: few rows at a time.
BATCH_ROWS: Final = 16
# The footer (columns times row groups) is read at once and takes some fifteen times its size.
FOOTER_BYTES: Final = 32 * 1024 * 1024
CHUNK_BYTES: Final = 1 << 20


class Unreadable(TunepoolError):
    """The file is not what its name says, or more than may be read. `param` is the row at fault, if one is."""

    code = "unreadable_table"


def main(spec_file: Path, out: Path) -> int:
    """Unpack one file and translate how it ends into an exit code."""
    out.mkdir(parents=True, exist_ok=True)
    spec = UnpackSpec.model_validate_json(spec_file.read_bytes())
    limit_memory(spec.memory_bytes)
    try:
        write(lines_of(spec, partial(note, out)), out / "rows.jsonl", most=spec.max_bytes)
    except RowRefused as refused:
        tell(out, code=refused.code, message=refused.reason, param=f"{refused.unit} {refused.line}")
        return EXIT_USER_FAULT
    except (FileRefused, TunepoolError) as error:
        tell(out, code=getattr(error, "code", "wrong_file_type"), message=str(error))
        return EXIT_USER_FAULT
    except (MemoryError, pa.ArrowMemoryError):
        tell(out, code="table_too_large", message=too_large(spec))
        return EXIT_OUT_OF_MEMORY
    return EXIT_DONE


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


def note(out: Path, columns: TableColumns) -> None:
    """Write which columns were read, once they are known."""
    (out / "columns.json").write_text(columns.model_dump_json(), encoding="utf-8")


def lines_of(spec: UnpackSpec, noted: Noted) -> Iterator[bytes]:
    """The file's rows as JSONL lines. Raises RowRefused, Unreadable."""
    if spec.source == "csv":
        return csv_lines(_chunks(Path(spec.file)), noted=noted)
    return table_lines(parquet_rows(Path(spec.file), noted))


def parquet_rows(file: Path, noted: Noted) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, its known columns only, a few in memory at a time.

    Raises:
        Unreadable: code `unreadable_table` for what is no Parquet or damaged, `table_too_large` for a footer that is.
        RowRefused: no column is known, or one is not named as it should be.
    """
    footer = _footer_bytes(file)
    if footer > FOOTER_BYTES:
        message = (
            f"The file's footer weighs {footer:,} bytes, at most {FOOTER_BYTES:,} are read: it has too many columns or "
            "row groups. Write fewer, or upload JSONL."
        )
        raise Unreadable(message, code="table_too_large")
    try:
        with pq.ParquetFile(
            file, thrift_string_size_limit=FOOTER_BYTES, thrift_container_size_limit=1_000_000, pre_buffer=False
        ) as opened:
            columns = chosen(opened.schema_arrow.names, unit="row")
            noted(columns)
            for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=columns.read, use_threads=False):
                yield from batch.to_pylist()
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise Unreadable(f"The file cannot be read as Parquet ({reason}); write it again, or upload JSONL.") from error


def _footer_bytes(file: Path) -> int:
    """What the file says its footer weighs, as far as it can: damage is for the reader to tell."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 8))
        return min(size, int.from_bytes(stream.read(4), "little"))


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
