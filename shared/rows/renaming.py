"""`training.columns`: rows whose columns have other names than ours. One reading for check, preflight and trainer.

`columns` maps a name of `shared.rows.formats` to the name that the column has in the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from shared.rows.cells import TALKS, TEXTS, cell
from shared.rows.shapes import Row

# A row may lack these; without any of the others it is no row of its shape.
OPTIONAL: Final = frozenset(
    {"system", "tools", "input", "history", "functions", "parallel_tool_calls", "reasoning_content"}
)
RENAMED: Final = "renamed_columns"
_HEAD: Final = re.compile(r"[^.\[]+")
_SHOWN: Final = 20


class ColumnMismatch(ValueError):
    """A row that `columns` cannot be applied to: code `missing_column` or `two_columns`, and our name at fault."""

    def __init__(self, code: str, name: str) -> None:
        super().__init__(code)
        self.code, self.name = code, name


def renamed(row: Row, columns: Mapping[str, str], *, cells: bool = False) -> Row:
    """The row under our names. Pure.

    Args:
        cells: the values are cells of a CSV file: text that may stand for JSON or a truth, or be empty.

    Raises:
        Misnamed: a column that the row needs has no value, or one of our names stands in the row already.
    """
    sources = set(columns.values())
    read = {name: value for name, value in row.items() if name not in sources}
    for name, column in columns.items():
        if read.get(name) is not None:
            raise ColumnMismatch("two_columns", name)
        value = row.get(column)
        if cells and isinstance(value, str):
            value = cell(name, value)
        if value is None and cells and name in TEXTS and not TALKS & columns.keys():
            value = ""  # as an empty cell under our own name
        if value is None and name not in OPTIONAL:
            raise ColumnMismatch("missing_column", name)
        if value is not None:
            read[name] = value
    return read


def in_file(param: str, columns: Mapping[str, str]) -> str:
    """The path of a value under the name that its column has in the file."""
    head = _HEAD.match(param)
    return columns.get(head[0], head[0]) + param[head.end() :] if head else param


class ColumnCounts:
    """How `columns` matched a file: each kind of fault is reported once, with its count."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self._names: list[str] = []
        self._seen: set[str] = set()
        self._faults: dict[tuple[str, str], tuple[int, int]] = {}  # (code, our name): first line, rows

    @property
    def says(self) -> str:
        """What was read as what."""
        listed = ", ".join(f"{column} as {name}" for name, column in self.columns.items())
        return f"training.columns: {listed} was read."

    def meet(self, row: Row) -> None:
        """Note which of the columns a row has."""
        if not self._names:
            self._names = sorted(row)
        if len(self._seen) < len(self.columns):
            self._seen |= {column for column in self.columns.values() if column in row}

    def refuse(self, line: int, fault: ColumnMismatch) -> None:
        """Note a row that could not be read under our names."""
        first, rows = self._faults.get((fault.code, fault.name), (line, 0))
        self._faults[fault.code, fault.name] = (first, rows + 1)

    def faults(self, left: Collection[str]) -> Iterator[tuple[int, str, str, str]]:
        """(line, param, code, message) of each fault. `left`: columns of the file that are not among its rows."""
        for name, column in self.columns.items():
            if column not in self._seen and self._names:
                yield 1, f"training.columns.{name}", "unknown_column", self._unknown(name, column, left)
        for (code, name), (line, rows) in self._faults.items():
            column = self.columns[name]
            if column in self._seen:
                yield line, f"training.columns.{name}", code, _say(code, name, column, rows)

    def _unknown(self, name: str, column: str, left: Collection[str]) -> str:
        if column in left:
            why = "that column is not read: it holds no text, or the table has too much of it"
            return f"training.columns reads {column} as {name}, but {why}."
        near = difflib.get_close_matches(column, self._names, n=1)
        hint = f"did you mean {near[0][:80]}? " if near else ""
        listed = ", ".join(other[:80] for other in self._names[:_SHOWN])
        return f"training.columns reads {column} as {name}, but no row has it; {hint}the first has: {listed}."


def _say(code: str, name: str, column: str, rows: int) -> str:
    more = "" if rows == 1 else f" ({rows:,} rows)"
    if code == "two_columns":
        return (
            f"The row has {name} too, beside {column}, which training.columns reads as {name}{more}; "
            f"read {name} as something else, or remove it."
        )
    return f"The row has no {column}, which training.columns reads as {name}{more}; add it, or remove the row."
