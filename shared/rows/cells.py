"""The columns and cells of tables: the columns that make rows, the reported ones that are left out, and the meaning of
a cell's text.

A table's rows are judged where those of JSONL are (`shared.rows.columns`). So every column that a rule there could obey
or refuse is read. The others are named, and left where they are.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final

from pydantic import Field

from shared.contract.part import Part
from shared.rows import foreign, formats, shapes, strict_json, text_conversations
from shared.rows.columns import MEANT, is_media, near_miss, weighs
from shared.rows.lines import BOM, Unit

_KNOWN: Final = frozenset[str]().union(*formats.KEYS.values(), foreign.COLUMNS)
_READ: Final = _KNOWN | MEANT
_MARKS: Final = frozenset(shapes.MARKS) | {"output", "label", "rejected"}
_JSON_COLUMNS: Final = frozenset(
    {"messages", "tools", "conversations", "input", "prompt", "completion", "chosen", "rejected", "history"}
    | {"preferred_completion", "non_preferred_completion", "preferred_output", "non_preferred_output", "functions"}
)
_TALK_OR_TEXT: Final = frozenset({"input", "prompt", "completion", "chosen", "rejected"})
# An empty cell is an empty text in these, where they are the row; in all other columns it is nothing.
TEXTS: Final = frozenset({"prompt", "completion", "instruction", "output", "text"})
_ANSWER_TO: Final = {"prompt": "completion", "instruction": "output"}
TALKS: Final = frozenset({"messages", "conversations", "chosen"})
_BOOLEAN_COLUMNS: Final = frozenset({"label", "kto_tag", "parallel_tool_calls", "train_on_input"})
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_LINE_BYTES: Final = 8 * 1024 * 1024
NAMES_TOLD: Final = 1000
_NAME_CHARACTERS: Final = 80
_MOST_OTHERS: Final = 100  # a table with more has features in its columns, not rows of text


class TableColumns(Part):
    """`columns.json`, beside the rows that were made of a file: what was left out of them, and what counts them."""

    read: list[str] = Field(default=[], max_length=NAMES_TOLD)
    dropped: list[str] = Field(default=[], max_length=NAMES_TOLD, description="They are not among the rows.")
    cells: bool = Field(default=False, description="The rows' values are cells of a CSV file.")
    unit: Unit | None = Field(default=None, description="What the rows' numbers count; null: the file's own lines.")


Noted = Callable[[TableColumns], None]


class MapCell(dict[str, Any]):
    """An object of a table that has keys of its own (a map): its nulls are what the row says."""


class RowRefused(ValueError):
    """A row broke a rule; run `shared.rows.check.check` first, which lists every such row."""

    def __init__(self, message: str, *, line: int, code: str, unit: Unit = "line") -> None:
        super().__init__(f"{unit} {line}: {message}")
        self.reason = message
        self.line = line
        self.code = code
        self.unit = unit


def chosen(names: list[str], *, unit: Unit = "line", others: Collection[str] | None = None) -> TableColumns:
    """Tell the columns of a table that its rows need from those that no rule asks for.

    Args:
        others: columns that a job may read under our names (`training.columns`): read too, each that has a name of its
            own, unless there are very many. None: only what rules ask for; a table without such a column is refused.

    Raises:
        RowRefused: a name stands twice, differs from a known one in capitals or spaces, or none is known.
    """
    counts, listed = Counter(names), ", ".join(names)[:200]
    known = [name for name in names if _is_read(name)]
    if others is None:
        _refuse_unknown(names, listed, unit=unit)
    if len(set(known)) != len(known) or len(known) > NAMES_TOLD:
        message = f"the columns ({listed}) must name known columns each once"
        raise RowRefused(message, line=1, code="unknown_format", unit=unit)
    more = [name for name in others or () if counts[name] == 1 and name and not _is_read(name)]
    read = known + more if len(more) <= _MOST_OTHERS else known
    if not read:
        raise _no_known(listed, unit)
    dropped = sorted({name[:_NAME_CHARACTERS] for name in counts.keys() - set(read)})
    return TableColumns(read=read, dropped=dropped[:NAMES_TOLD], unit=unit)


def _refuse_unknown(names: list[str], listed: str, *, unit: Unit) -> None:
    for name in names:
        plain = name.strip().casefold()
        if plain != name and plain in _MARKS and plain not in names:
            message = f"the column {name[:80]!r} differs from {plain} in capitals or spaces; write it small"
            raise RowRefused(message, line=1, code="unknown_format", unit=unit)
    if not _KNOWN & set(names):
        raise _no_known(listed, unit)


def _no_known(listed: str, unit: Unit) -> RowRefused:
    message = f"the columns ({listed}) must name known columns, such as messages, text, or prompt and completion"
    return RowRefused(message, line=1, code="unknown_format", unit=unit)


def _is_read(name: str) -> bool:
    short = name[:_NAME_CHARACTERS]
    return name in _READ or is_media(name) or weighs(short) or near_miss(short, _KNOWN) is not None


def is_header(head: bytes) -> bool:
    """Whether a text begins with a line of column names, one of them known, or with what Excel writes before it."""
    line = head.split(b"\n", 1)[0].decode(errors="replace").strip()
    if line.lower().startswith("sep="):
        return True
    names = {name.strip().strip('"').casefold() for name in re.split("[,;\t]", line)}
    return bool(names & _KNOWN)


def csv_lines(chunks: Iterable[bytes], *, noted: Noted | None = None, others: bool = False) -> Iterator[bytes]:
    """Stream a CSV or TSV file (UTF-8, one header row) as JSONL; each row stands on the line where it begins there.

    The header tells commas from tabs. Cells of list-like columns may hold JSON. Empty cells are left out, unless the
    row is made of such texts.
    A cell may hold 131,072 characters (the csv module's guard). `noted` hears of the columns. With `others`, columns
    that no rule asks for are among the rows.

    Raises:
        RowRefused: not CSV, not UTF-8, or a header that names no known column; `line` is the file's.
    """
    texts = _text_lines(chunks)
    first = next(texts, "")
    delimiter = _delimiter(first)
    reader = csv.reader(itertools.chain([first], texts), strict=True, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = chosen(header, others=header if others else None).model_copy(update={"cells": True})
        if noted:
            noted(columns)
        read, written, begins = set(columns.read), 0, reader.line_num + 1
        for cells in reader:
            if cells:
                row = _row(header, cells, read, line=begins)
                yield b"\n" * (begins - written - 1) + row
                written = begins
            begins = reader.line_num + 1
    except csv.Error as error:
        if "new-line character" in str(error):
            message = "lines end with a lone carriage return (CR); save the file with LF or CRLF line endings"
            raise RowRefused(message, line=max(1, reader.line_num), code="cr_line_endings") from None
        raise RowRefused(f"not valid CSV ({error})", line=max(1, reader.line_num), code="invalid_csv") from None


def _delimiter(header: str) -> str:
    """What stands between the columns. Raises RowRefused for what spreadsheets write in place of commas."""
    plain = header.strip()
    if plain.lower().startswith("sep="):
        message = f"{plain[:20]!r} is a mark for Excel, and no header; remove the line"
        raise RowRefused(message, line=1, code="invalid_csv")
    if "\t" in plain and "," not in plain:
        return "\t"
    for mark, word in ((";", "semicolons"), ("|", "bars")):
        if mark in plain and "," not in plain:
            message = f"{word} stand between the columns; save it with commas or tabs"
            raise RowRefused(message, line=1, code="invalid_csv")
    return ","


def _row(header: list[str], cells: list[str], read: set[str], *, line: int) -> bytes:
    if len(cells) != len(header):
        message = f"{len(cells)} cells stand under {len(header)} columns; quote cells that hold commas or tabs"
        raise RowRefused(message, line=line, code="wrong_cell_count")
    row = {name: cell(name, text) for name, text in zip(header, cells, strict=True) if name in read}
    if not TALKS & row.keys():
        row |= {name: "" for name in TEXTS & row.keys() if row[name] is None}
    kept = {name: value for name, value in row.items() if value is not None or is_media(name)}
    return _line(kept | {name: None for name in row.keys() - kept.keys() if not _is_read(name)})


def table_lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Stream the rows of a table (Parquet, say) as JSONL, without nulls; line N is row N.

    What a cell of pictures or sounds holds is not written, only that it holds something: no row may have one.

    Raises:
        RowRefused: a cell holds something that JSON has no word for, such as bytes or a date.
    """
    for number, row in enumerate(rows, start=1):
        known = {
            name: _medium(value) if is_media(name) else _value_of(name, value)
            for name, value in row.items()
            if value is not None or is_media(name)  # a message may point to it all the same
        }
        # Of a question that is null an empty text is left, as of an empty cell: its answer is trained alone.
        for asked, answer in _ANSWER_TO.items():
            if answer in known and asked in row:
                known.setdefault(asked, "")
        try:
            yield _line(known)
        except (TypeError, ValueError) as error:
            raise RowRefused(_odd_cell(known, error), line=number, code="wrong_type", unit="row") from None


def _odd_cell(row: dict[str, Any], error: Exception) -> str:
    """Which column holds what JSON has no word for, and the remedy."""
    for name, value in row.items():
        try:
            _line({name: value})
        except (TypeError, ValueError) as odd:
            return f"the column {name[:_NAME_CHARACTERS]} cannot be read as text ({odd}); write it as a column of text"
    return f"a cell cannot be read as text ({error}); write it as a column of text"


def _value_of(name: str, value: Any) -> Any:
    """A cell's value: messages and the like may be JSON text, as in a CSV file."""
    if isinstance(value, str) and name in _JSON_COLUMNS and value[:1] in {"[", "{"}:
        return cell(name, value)
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """A cell without the fields that are null: an object of a table has the fields of all rows, its own and theirs."""
    if isinstance(value, dict):
        keeps = isinstance(value, MapCell)
        return {name: _without_nulls(field) for name, field in value.items() if keeps or field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _medium(value: Any) -> Any:
    if value in (None, "", b"", [], {}):
        return None
    return value if isinstance(value, str) else f"({type(value).__name__})"


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _text_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    number, held = 1, b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for data in whole:
            yield _decoded(data + b"\n", number)
            number += 1
        if len(held) > _LINE_BYTES:
            message = f"the line is longer than {_LINE_BYTES:,} bytes; split the example"
            raise RowRefused(message, line=number, code="line_too_long")
    if held:
        yield _decoded(held, number)


def _decoded(data: bytes, number: int) -> str:
    try:
        return data.removeprefix(BOM if number == 1 else b"").decode()
    except UnicodeDecodeError:
        raise RowRefused("not valid UTF-8; save the file as UTF-8", line=number, code="invalid_utf8") from None


def cell(name: str, text: str) -> Any:
    """What the text of a CSV file's cell means in the column `name`."""
    if name in _BOOLEAN_COLUMNS:
        return _BOOLEANS.get(text.strip().lower(), text or None)
    if name in _JSON_COLUMNS and text.lstrip()[:1] in {"[", "{"}:
        try:
            value = strict_json.parse(text, long_integers=True)
        except strict_json.BadJson:
            return text
        return text if name in _TALK_OR_TEXT and not text_conversations.is_talk(value) else value
    return text or None
