"""Every value passes here on its way into a JSON column: Postgres takes no NUL, no half of a surrogate pair, no NaN.

Requests with such text are refused long before. This is for what programs on strangers' data report: a statement that
fails over it would fail again with every worker that takes the work up.
"""

from __future__ import annotations

import json
import math
from typing import Any


def written(value: Any) -> str:
    """The value as JSON that Postgres takes: a character that it cannot hold is U+FFFD, a number is null."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # NaN or an infinity; a circle raises once more
        return json.dumps(_held(value), allow_nan=False)
    # json.dumps escapes both in this form; text that spells one out passes unchanged through the slow way.
    return json.dumps(_held(value)) if "\\u0000" in text or "\\ud" in text else text


def held_text(text: str) -> str:
    """The text with U+FFFD for each character that Postgres cannot hold."""
    if text.isprintable():
        return text
    return "".join(
        "\ufffd" if character == "\0" or "\ud800" <= character <= "\udfff" else character for character in text
    )


def _held(value: Any) -> Any:
    if isinstance(value, str):
        return held_text(value)
    if isinstance(value, dict):
        return {held_text(name) if isinstance(name, str) else name: _held(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_held(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
