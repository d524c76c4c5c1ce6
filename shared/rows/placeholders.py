"""`{{ item.answer }}` and `{{ sample.output_text }}`: the placeholders of OpenAI's graders. Pure.

A parser of its own, no template language: the text and the row both come from a stranger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

MAX_RENDERED: Final = 1_000_000  # characters of a text whose placeholders are filled

_PLACEHOLDER: Final = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH: Final = re.compile(r"\s*(item|sample)((?:\.[^\s.\[\]{}]{1,200}|\[[0-9]{1,6}\]){1,20})\s*")
_STEP: Final = re.compile(r"\.([^\s.\[\]{}]+)|\[([0-9]+)\]")


class BadPlaceholder(ValueError):
    """The text holds a placeholder that names neither `item` nor `sample`, or is no path."""


class NoSuchVariable(LookupError):
    """A row or an answer has nothing at the path that a placeholder names."""


class TooLong(ValueError):
    """The filled text would have more than `MAX_RENDERED` characters."""


def check(text: str) -> None:
    """Raises BadPlaceholder for the first one that can never be filled."""
    for placeholder in _PLACEHOLDER.finditer(text):
        _path_of(placeholder[1])


def fill(text: str, variables: Mapping[str, Any]) -> str:
    """The text with each placeholder replaced: strings as they are, other values as compact JSON.

    Args:
        variables: what `item` and `sample` are.

    Raises:
        NoSuchVariable, TooLong, BadPlaceholder
    """
    filled, left, at = [], MAX_RENDERED, 0
    for placeholder in _PLACEHOLDER.finditer(text):
        namespace, steps = _path_of(placeholder[1])
        for piece in (text[at : placeholder.start()], _written(_look(variables[namespace], steps, placeholder[1]))):
            filled.append(piece)
            left -= len(piece)
        if left < 0:
            raise TooLong
        at = placeholder.end()
    return "".join((*filled, text[at:]))


def reach(value: Any, path: str) -> Any:
    """What lies at `path` (`order.lines[0].sku`) in a value of JSON. Raises BadPlaceholder, NoSuchVariable."""
    _, steps = _path_of(f"item{path}" if path.startswith("[") else f"item.{path}")
    return _look(value, steps, path)


def _path_of(inner: str) -> tuple[str, list[str | int]]:
    path = _PATH.fullmatch(inner)
    if path is None:
        raise BadPlaceholder(inner.strip()[:100])
    steps: list[str | int] = [name or int(index) for name, index in _STEP.findall(path[2])]
    return path[1], steps


def _look(value: Any, steps: list[str | int], inner: str) -> Any:
    for step in steps:
        try:
            value = value[step]
        except (LookupError, TypeError):
            raise NoSuchVariable(inner.strip()) from None
    return value


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
