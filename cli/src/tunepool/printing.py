"""Prints answers of the native routes: JSON as the server sent it, or a table of the important columns."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

PROGRAM_WIDTH: Final = 10_000  # columns; rich cuts cells that do not fit
_MARKDOWN: Final = re.compile(r"[\\`\[\]|]")


def show(context: typer.Context, answer: Any, text: str) -> None:
    """One answer: a line of JSON with --json, else `text`."""
    print(json_line(answer) if context.obj.as_json else printable(text))


def show_rows(context: typer.Context, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Many: one line of JSON each with --json, else a table. A column `a.b` is `b` inside `a`."""
    if context.obj.as_json:
        for row in rows:
            show(context, row, "")
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:  # an id that is cut is of no use
        table.add_column(column, no_wrap=not sys.stdout.isatty() or _is_id(column), overflow="ignore")
    for row in rows:
        table.add_row(*(plain(cell(column, _at(row, column))) for column in columns))
    if sys.stdout.isatty():
        Console().print(table)
    else:  # a program reads it: whole cells, however wide
        Console(width=PROGRAM_WIDTH, soft_wrap=True).print(table)


def _is_id(column: str) -> bool:
    return column == "id" or column.endswith((".id", "_id"))


def json_line(answer: Any) -> str:
    """One line. Whatever would act on a terminal is escaped, which changes nothing for a program that reads it."""
    text = json.dumps(answer, ensure_ascii=False)
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if ord(character) > 0xFFFF else f"\\u{ord(character):04x}"


def printable(text: str) -> str:
    """Without control characters and marks that turn the direction: what others wrote does not act on a terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def markdown_text(text: str) -> str:
    """In a cell or a line of Markdown: what others wrote makes no cell, link, picture, code or tag of its own."""
    line = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\g<0>", line)


def markdown_code(text: str) -> str:
    """The same as code. Nothing can be escaped there: what would end the code or the cell is shown as its like."""
    line = printable(text).replace("\n", " ").replace("`", "'").replace("|", "\u00a6")
    return f"`{line}`"


def plain(text: str) -> Text:
    """For rich, which would read markup in a string."""
    return Text(printable(text))


def _at(row: dict[str, Any], column: str) -> Any:
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def cell(column: str, value: Any) -> str:
    """What a table shows for a value; a column's name tells a moment or a size."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if column.endswith(("_at", "_seen", "eta_high", "eta_low")):
        return f"{datetime.fromtimestamp(value, tz=UTC):%Y-%m-%d %H:%M:%SZ}"
    if column.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
