"""Common slips in a JSON text, called by their own names instead of the parser's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

_QUOTES: Final = "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u00ab\u00bb"
_PYTHON: Final = re.compile(r"'|(?:True|False|None)\b")
_AFTER_COMMA: Final = re.compile(r"[}\]]")

# Where the parser stopped: what stands before (without spaces at its end) and behind, and what it is called.
_SLIPS: Final[tuple[tuple[Callable[[str, str], object], str], ...]] = (
    (
        lambda _, rest: rest.startswith("\ufeff"),
        "A byte order mark stands in the middle of the file, as where files were joined; remove it.",
    ),
    (
        lambda before, rest: before.endswith(",") and _AFTER_COMMA.match(rest),
        "A comma stands before the closing {0}; remove it.",
    ),
    (
        lambda before, rest: before.endswith("}") and rest.strip() == ",",
        "A comma stands behind the object, as in an array; remove it, or put all rows in one array, in brackets.",
    ),
    (lambda before, rest: before.endswith(",") and rest.startswith(","), "Two commas stand in a row; remove one."),
    (
        lambda _, rest: rest[:1] and rest[0] in _QUOTES,
        "A typographic quotation mark ({0}) stands where JSON has a plain one; replace those around keys and text.",
    ),
    (
        lambda _, rest: _PYTHON.match(rest),
        "The line is a Python literal (single quotes, True, None), not JSON; write each row with json.dumps.",
    ),
    (
        lambda _, rest: rest.startswith(("//", "/*", "#")),
        "A comment stands in the JSON, which knows none; remove it.",
    ),
    (
        lambda before, rest: not before and rest.startswith("```"),
        "A fence of Markdown (```) stands around the rows; remove its lines.",
    ),
    (
        lambda _, rest: rest[:1] in "\u00a0\u200b\u2060" and rest[:1],
        "An invisible character (a no-break or zero-width space) stands between the parts of the JSON; remove it.",
    ),
    (
        lambda before, rest: rest[:1].isalpha() and before.endswith(("{", ",")),
        'A key stands without quotation marks; write "key", as json.dumps does.',
    ),
)


def named(text: str, place: int) -> str | None:
    """What stands at `place`, where a parser of JSON stopped, and its remedy; None for what has no name here."""
    before, rest = text[max(0, place - 64) : place].rstrip(), text[place : place + 8]
    message = next((message for is_so, message in _SLIPS if is_so(before, rest)), None)
    return message and message.replace("{0}", rest[:1])


def is_python(text: str) -> bool:
    """Whether a text begins as Python writes a dict or a list of dicts, and JSON does not."""
    return re.match(r"\s*\[?\s*\{\s*'", text) is not None
