"""The rows of Parquet and Arrow files, a few in memory at a time, of the columns that a rule of rows asks for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from shared.errors import TunepoolError
from shared.rows.cells import MapCell, Noted, chosen

# A cell of a few bytes in the file may be megabytes, as dictionaries and run lengths repeat them: few rows at a time.
BATCH_ROWS: Final = 16
# The footer (columns times row groups) is read at once and takes some fifteen times its size.
FOOTER_BYTES: Final = 32 * 1024 * 1024
_STREAM: Final = b"\xff\xff\xff\xff"


class Unreadable(TunepoolError):
    """The file is not what its first bytes say, or more than may be read."""

    code = "unreadable_table"


def parquet_rows(file: Path, noted: Noted, *, others: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file. With `others`, of columns of text that no rule asks for, too.

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
    with (
        _named_errors("Parquet"),
        pq.ParquetFile(
            file, thrift_string_size_limit=FOOTER_BYTES, thrift_container_size_limit=1_000_000, pre_buffer=False
        ) as opened,
    ):
        schema = opened.schema_arrow
        columns = chosen(schema.names, unit="row", others=_of_text(schema) if others else None)
        noted(columns)
        for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=columns.read, use_threads=False):
            yield from _rows_of(batch)


def arrow_rows(file: Path, noted: Noted, *, others: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file (Feather, too) or stream. It is mapped; each of its batches is validated before use.

    Raises:
        Unreadable: no Arrow, or damaged.
        RowRefused: no column is known, or one is not named as it should be.
    """
    with _named_errors("Arrow"), pa.memory_map(str(file)) as source:
        schema = _opened(source, ipc.IpcReadOptions(use_threads=False)).schema
        names = schema.names
        columns = chosen(names, unit="row", others=_of_text(schema) if others else None)
        noted(columns)
        wanted = [names.index(name) for name in columns.read]
        reader = _opened(source, ipc.IpcReadOptions(use_threads=False, included_fields=wanted))
        for batch in _batches(reader):
            # Arrow trusts the offsets of a file, Parquet's reader makes its own.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from _rows_of(batch.slice(start, BATCH_ROWS))


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch. Maps become objects, which pyarrow writes as lists of pairs."""
    mapped = [field for field in batch.schema if _holds_map(field.type)]
    for row in batch.to_pylist():
        for field in mapped:
            row[field.name] = _with_maps(row[field.name], field.type)
        yield row


def _holds_map(kind: Any) -> bool:
    if pa.types.is_map(kind):
        return True
    if pa.types.is_struct(kind):
        return any(_holds_map(field.type) for field in kind)
    return _is_list(kind) and _holds_map(kind.value_type)


def _with_maps(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if pa.types.is_map(kind):
        made = MapCell((name, _with_maps(item, kind.item_type)) for name, item in value)
        if len(made) != len(value):
            raise Unreadable("A map of the table has a key twice; keep one of them.", code="duplicate_key")
        return made
    if pa.types.is_struct(kind):
        return {field.name: _with_maps(value[field.name], field.type) for field in kind}
    return [_with_maps(item, kind.value_type) for item in value] if _is_list(kind) else value


def _is_list(kind: Any) -> bool:
    listed = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
        pa.types.is_fixed_size_list,
    )
    return any(is_so(kind) for is_so in listed)


def _of_text(schema: Any) -> list[str]:
    """Columns that may be rows under another name: texts, truths, whole numbers, and lists and objects of them."""
    return [field.name for field in schema if _is_plain(field.type) or _is_nested(field.type)]


def _is_plain(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_nested(kind: Any) -> bool:
    """Lists of numbers (token ids, embeddings) are none: no row of ours has them."""
    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) or _is_nested(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _is_text(kind.key_type) and (_is_plain(kind.item_type) or _is_nested(kind.item_type))
    return _is_list(kind) and (_is_text(kind.value_type) or _is_nested(kind.value_type))


def _opened(source: Any, options: ipc.IpcReadOptions) -> Any:
    source.seek(0)
    is_stream = source.read(len(_STREAM)) == _STREAM
    source.seek(0)
    return ipc.open_stream(source, options=options) if is_stream else ipc.open_file(source, options=options)


def _batches(reader: Any) -> Iterator[Any]:
    if isinstance(reader, ipc.RecordBatchStreamReader):
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


@contextlib.contextmanager
def _named_errors(kind: str) -> Iterator[None]:
    """Raises Unreadable for what the reader of `kind` raises of damage."""
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise Unreadable(f"The file cannot be read as {kind} ({reason}); write it again, or upload JSONL.") from error


def _footer_bytes(file: Path) -> int:
    """What the file says its footer weighs, as far as it can: damage is for the reader to tell."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 8))
        return min(size, int.from_bytes(stream.read(4), "little"))
