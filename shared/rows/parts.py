"""What rows of other services have in common: objects in lists, parts of text, keys that are left out. Pure."""

from __future__ import annotations

from typing import Any, Final

from shared.rows.shapes import Row

# Messages, and their conversation under other names, stand in the way of a form that would write them.
_OURS: Final = ("messages", "conversations", "prompt", "instruction", "chosen", "text")


def without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def is_ours(row: Row) -> bool:
    return any(row.get(key) is not None for key in _OURS)


def objects(value: Any) -> list[dict[str, Any]] | None:
    """A list of objects that is not empty; None for all else."""
    return value if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) else None


def text_of(parts: Any) -> str | None:
    """The text of parts that are nothing but text, joined as OpenAI's are; None for all others."""
    listed = objects(parts)
    if listed is None or not all(isinstance(part.get("text"), str) for part in listed):
        return None
    kinds = all(part.keys() == {"text"} or part.get("type") == "text" for part in listed)
    return "".join(part["text"] for part in listed) if kinds else None
