"""Makes strangers' text harmless to show: no control codes for a terminal, no marks that turn a line around."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

# C0 and C1 steer terminals (ECMA-48); the embeddings, overrides and isolates of Unicode's bidirectional algorithm
# (UAX 9) show a line in another order than it is read.
_ACTING: Final = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, *, kept: str = "\n") -> str:
    """Without control characters, lone surrogates and marks of direction, each shown as U+FFFD; `kept` stay."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in kept else "\ufffd" for character in text)


def acting(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, character) of each text of a JSON value that holds a control character or a mark of direction."""
    if isinstance(value, str):
        match = _ACTING.search(value)
        if match is not None:
            yield path, match[0]
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from acting(name, _below(path, name))
            yield from acting(item, _below(path, name))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from acting(item, _below(path, str(place)))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
