"""From what users bring to what the trainer reads: canonical JSONL out of JSONL, CSV or tables, streaming and pure."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import msgspec
from pydantic import Field

from shared.contract.spec import Part
from shared.rows import formats, strict_json
from shared.rows.check import DEFAULT_LIMITS
from shared.rows.foreign import recast
from shared.rows.lines import BOM, decode, lines
from shared.rows.rules import check_row

Source = Literal["jsonl", "csv", "parquet"]
SUFFIXES: Final[dict[str, Source]] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}

_JSON_COLUMNS = frozenset(
    {"messages", "tools", "conversations", "input", "prompt", "completion", "chosen", "rejected", "history"}
    | {"preferred_completion", "non_preferred_completion", "functions"}
)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
COLUMNS = frozenset().union(*formats.KEYS.values())


class UnpackSpec(Part):
    """The file that the program which opens CSV and Parquet files is started with (`worker.program.unpack`)."""

    file: str
    source: Literal["csv", "parquet"]
    max_bytes: int = Field(ge=1, description="Of the JSONL that is made.")
    memory_bytes: int = Field(ge=1, description="The program may gain so much beyond its libraries.")


class RowRefused(ValueError):
    """A row broke a rule; run `dataset_check.check` first, which lists every such row."""

    def __init__(self, message: str, *, line: int, code: str) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line
        self.code = code


def source_of(filename: str) -> Source | None:
    """What kind of file a name promises; None for a name that promises none that can be read."""
    return next((source for suffix, source in SUFFIXES.items() if filename.lower().endswith(suffix)), None)


def convert(chunks: Iterable[bytes], *, source: Literal["jsonl", "csv"]) -> Iterator[bytes]:
    """Stream canonical JSONL lines, each with its newline. Parquet is opened elsewhere: see `table_lines`.

    Raises:
        RowRefused: at the first row that breaks a rule.
        FileRefused: the bytes are another kind of file.
    """
    return canonical_lines(chunks if source == "jsonl" else csv_lines(chunks))


def canonical_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Stream a JSONL file of any known shape as canonical JSONL. Raises as `convert` does."""
    first: formats.Shape | None = None
    for line in lines(chunks, limit=DEFAULT_LIMITS.line_bytes):
        if not line.data.strip():
            continue
        if not line.whole:
            raise RowRefused("the line is too long", line=line.number, code="line_too_long")
        try:
            row = strict_json.parse(decode(line), long_integers=True)
            row = recast(row if isinstance(row, dict) else {}).row
            shape = formats.detect(row)
        except (strict_json.BadJson, formats.UnknownShape) as bad:
            raise RowRefused(str(bad), line=line.number, code=bad.code) from None
        first = first or shape
        if shape != first:
            raise RowRefused(f"the row is {shape}, the first was {first}", line=line.number, code="mixed_formats")
        problems = check_row(row, shape).problems
        if problems:
            raise RowRefused(problems[0].message, line=line.number, code=problems[0].code)
        yield msgspec.json.encode(formats.normalise(row, shape)) + b"\n"


def checked_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """What `canonical_lines` makes of a file that the check has accepted: the same, in half the time."""
    shape: formats.Shape | None = None
    for line in lines(chunks, limit=DEFAULT_LIMITS.line_bytes):
        if not line.data.strip():
            continue
        row = recast(msgspec.json.decode(line.data)).row
        shape = shape or formats.detect(row)
        yield msgspec.json.encode(formats.normalise(row, shape)) + b"\n"


def csv_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Stream a CSV file (UTF-8, one header row) as JSONL; line N is record N, the header not counted.

    Cells of list-like columns may hold JSON; empty cells of other columns than the text are left out;
    columns that no format knows are dropped. A cell may hold 131,072 characters (the csv module's guard).

    Raises:
        RowRefused: not CSV, not UTF-8, or a header that names no known column; `line` is the file's.
    """
    reader = csv.reader(_text_lines(chunks), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not COLUMNS & set(header) or len(set(header)) != len(header):
            message = (
                f"the header ({', '.join(header)[:200]}) must name known columns, each once, such as prompt,completion"
            )
            raise RowRefused(message, line=1, code="unknown_format")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                message = f"{len(cells)} cells stand under {len(header)} columns; quote cells that hold commas"
                raise RowRefused(message, line=reader.line_num, code="wrong_cell_count")
            row = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if name in COLUMNS}
            yield json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False).encode() + b"\n"
    except csv.Error as error:
        raise RowRefused(f"not valid CSV ({error})", line=reader.line_num, code="invalid_csv") from None


def table_lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Stream the rows of a table (Parquet, say) as JSONL: known columns only, without nulls; line N is row N.

    Raises:
        RowRefused: a cell holds something that JSON has no word for, such as bytes or a date.
    """
    for number, row in enumerate(rows, start=1):
        known = {name: value for name, value in row.items() if name in COLUMNS and value is not None}
        try:
            yield json.dumps(known, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RowRefused(f"a cell cannot be read as text ({error})", line=number, code="wrong_type") from None


def _text_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    number, held = 1, b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for data in whole:
            yield _decoded(data + b"\n", number)
            number += 1
    if held:
        yield _decoded(held, number)


def _decoded(data: bytes, number: int) -> str:
    try:
        return data.removeprefix(BOM if number == 1 else b"").decode()
    except UnicodeDecodeError:
        raise RowRefused("not valid UTF-8; save the file as UTF-8", line=number, code="invalid_utf8") from None


def _cell(name: str, cell: str) -> Any:
    if name == "label":
        return _BOOLEANS.get(cell.strip().lower(), cell)
    if name in _JSON_COLUMNS and cell.lstrip()[:1] in {"[", "{"}:
        try:
            return strict_json.parse(cell, long_integers=True)
        except strict_json.BadJson:
            return cell
    return cell or None
