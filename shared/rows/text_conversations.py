"""Conversations that a row holds as JSON text, read as in a cell of a table. Pure, never raises.

A text that is one side of a pair is read so only where the other side is a conversation, too: an answer may well be
JSON itself.
"""

from __future__ import annotations

from typing import Any, Final

from shared.rows import strict_json
from shared.rows.formats import SHAREGPT_ROLES
from shared.rows.shapes import Row

# Text has no place in these.
_LISTS: Final = ("messages", "conversations", "conversation", "contents", "history")
# Columns that are conversations together, or texts together.
_SIDES: Final = (
    ("chosen", "rejected"),
    ("preferred_completion", "non_preferred_completion"),
    ("preferred_output", "non_preferred_output"),
    ("prompt", "completion"),
)
_ANSWERS: Final = ("chosen", "preferred_completion", "preferred_output")
_COLUMNS: Final = frozenset({*_LISTS, "input", *(column for sides in _SIDES for column in sides)})
_MARKS: Final = frozenset({"[", "{", ""})
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function", *SHAREGPT_ROLES})
SAYS: Final = {"json_text": "Conversations that were JSON text were read as the lists that they hold."}


def read(row: Row) -> tuple[Row, tuple[str, ...]]:
    """The row with its conversations as lists, and the form that they were read from."""
    if not any(type(text) is str and _begins(text) for column, text in row.items() if column in _COLUMNS):
        return row, ()
    made: Row = {}
    for column in _LISTS:
        if type(row.get(column)) is str and isinstance(value := _parsed(row[column]), list | dict):
            made[column] = value
    for sides in _SIDES:
        made |= _both(row, sides)
    for asked in ("prompt", "input"):
        if type(row.get(asked)) is str and any(isinstance(made.get(key, row.get(key)), list) for key in _ANSWERS):
            value = _parsed(row[asked])
            made |= {asked: value} if is_talk(value) else {}
    if row.get("history") == "" and "instruction" in row:
        made["history"] = []
    return ({**row, **made}, ("json_text",)) if made else (row, ())


def _begins(text: str) -> bool:
    """Whether a text begins as a list or an object does; an empty one may stand for such."""
    return text[:1] in _MARKS or (text[:1].isspace() and text.lstrip()[:1] in _MARKS)


def _both(row: Row, sides: tuple[str, str]) -> Row:
    """The sides of a row that are text, if each of the two is a conversation, as text or as it is."""
    texts = [side for side in sides if type(row.get(side)) is str]
    if not texts or not all(isinstance(row.get(side), str | list | dict) for side in sides):
        return {}
    values = {side: _parsed(row[side]) for side in texts}
    return values if all(map(is_talk, values.values())) else {}


def _parsed(text: str) -> Any:
    if not text or not _begins(text):
        return None
    try:
        return strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return None


def is_talk(value: Any) -> bool:
    """Whether a value is a message, messages, or an object of them, and not an answer that happens to be JSON."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return is_talk(value["messages"])
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and _speaks(item) for item in items)


def _speaks(item: dict[str, Any]) -> bool:
    """Whether an object says who speaks, in a word that is known, and what."""
    if "from" in item:
        return "value" in item and isinstance(item["from"], str) and item["from"] in _ROLES
    speaks = isinstance(item.get("role"), str) and item["role"] in _ROLES
    return speaks and not {"content", "tool_calls", "function_call"}.isdisjoint(item)
