"""Turns JSONL, CSV and tables of users into the canonical JSONL of the trainer. Streaming and pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import msgspec
from pydantic import Field

from shared.contract.part import Part
from shared.rows import formats, shapes, strict_json
from shared.rows.cells import RowRefused, csv_lines
from shared.rows.check import DEFAULT_LIMITS
from shared.rows.foreign import recast
from shared.rows.lines import decode, lines
from shared.rows.renaming import renamed
from shared.rows.rules import check_row


class UnpackSpec(Part):
    """The file that the program which makes rows of other files is started with (`worker.program.unpack`)."""

    file: str
    filename: str = Field(description="As uploaded: it tells a table of one column from other text.")
    max_bytes: int = Field(ge=1, description="Of the JSONL that is made.")
    memory_bytes: int = Field(ge=1, description="The program may gain so much beyond its libraries.")


def convert(chunks: Iterable[bytes], *, source: Literal["jsonl", "csv"]) -> Iterator[bytes]:
    """Stream canonical JSONL lines, each with its newline. Other files are opened elsewhere: `worker.program.unpack`.

    Raises:
        RowRefused: at the first row that breaks a rule.
        FileRefused: the bytes are another kind of file.
    """
    return canonical_lines(chunks if source == "jsonl" else csv_lines(chunks))


def canonical_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Stream a JSONL file of any known shape as canonical JSONL. Raises as `convert` does."""
    first: shapes.Shape | None = None
    for line in lines(chunks, limit=DEFAULT_LIMITS.line_bytes):
        if not line.data.strip():
            continue
        if not line.whole:
            raise RowRefused("the line is too long", line=line.number, code="line_too_long")
        try:
            row = strict_json.parse(decode(line), long_integers=True)
            row = recast(row if isinstance(row, dict) else {}).row
            shape = shapes.detect(row)
        except (strict_json.BadJson, shapes.UnknownShape) as bad:
            raise RowRefused(str(bad), line=line.number, code=bad.code) from None
        first = first or shape
        if shape != first:
            raise RowRefused(f"the row is {shape}, the first was {first}", line=line.number, code="mixed_formats")
        problems = check_row(row, shape).problems
        if problems:
            raise RowRefused(problems[0].message, line=line.number, code=problems[0].code)
        yield msgspec.json.encode(formats.normalise(row, shape)) + b"\n"


def checked_lines(
    chunks: Iterable[bytes], *, columns: Mapping[str, str] | None = None, cells: bool = False
) -> Iterator[bytes]:
    """`canonical_lines` of a file that the check has accepted: the same lines, in half the time.

    `columns` and `cells` are those of `shared.rows.check.check`.
    """
    shape: shapes.Shape | None = None
    for line in lines(chunks, limit=DEFAULT_LIMITS.line_bytes):
        if not line.data.strip():
            continue
        row = msgspec.json.decode(line.data)
        row = recast(renamed(row, columns, cells=cells) if columns else row).row
        shape = shape or shapes.detect(row)
        yield msgspec.json.encode(formats.normalise(row, shape)) + b"\n"
