"""What the rules say of one row: its faults and oddities, and the sizes that token estimates start from."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple


class RowFinding(NamedTuple):
    """One thing wrong (or, as a warning, odd) in a row. `param` is a path such as `messages[2].role`."""

    param: str
    code: str
    message: str


class RowFindings:
    """What one row showed: its faults, and the sizes that token estimates start from (characters)."""

    __slots__ = ("characters", "dropped", "messages", "problems", "trained_characters", "warnings")

    def __init__(self) -> None:
        self.problems: list[RowFinding] = []
        self.warnings: list[RowFinding] = []
        self.dropped: list[str] = []
        self.messages = 0
        self.characters = 0
        self.trained_characters = 0

    def refuse(self, param: str, code: str, message: str) -> None:
        self.problems.append(RowFinding(param, code, message))

    def warn(self, param: str, code: str, message: str) -> None:
        self.warnings.append(RowFinding(param, code, message))


MOST_LEVELS: Final = 32  # of nested lists and objects: what reads rows later walks them by recursion


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested in more than MOST_LEVELS."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def shown(value: Any) -> str:
    """A value as it reads in a message: at most 60 characters, and never a walk into nested data."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with keys {', '.join(sorted(value))[:60]}" if value else "an empty object"
    text = json.dumps(value[:80] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
