"""The arguments of a function call: JSON text of an object, read as it stands or out of a second encoding."""

from __future__ import annotations

import re

from shared.rows import strict_json

_MOST_ENCODINGS = 4
_PYTHON = re.compile(r"^\s*\{\s*'|[:,\[]\s*(?:True|False|None)\b")


class BadArguments(ValueError):
    """Arguments that are no JSON object. The message is the end of a sentence: the reason and the remedy."""


def object_text(arguments: str) -> str:
    """The JSON text of the object that `arguments` mean: themselves, or the text inside them when encoded twice.

    OpenAI's own drone example encodes arguments twice, and OpenAI trains that file.

    Raises:
        BadArguments: no JSON, JSON of something else, or a value that readers disagree on.
    """
    text = arguments
    for _ in range(_MOST_ENCODINGS):
        try:
            value = strict_json.parse(text, long_integers=True)
        except strict_json.BadJson as bad:
            raise BadArguments(_reason(text, bad)) from None
        if isinstance(value, dict):
            return text
        if not isinstance(value, str):
            break
        text = value
    raise BadArguments("use the JSON text of an object (json.dumps)")


def is_encoded_again(arguments: str) -> bool:
    """Does the text begin as a JSON text does? The arguments of a checked row then hold their object inside."""
    return arguments.lstrip()[:1] == '"'


def plain(arguments: str) -> str:
    """`object_text` of arguments that the check has passed, quick for those encoded once."""
    return object_text(arguments) if is_encoded_again(arguments) else arguments


def _reason(text: str, bad: strict_json.BadJson) -> str:
    if bad.code != "invalid_json":
        return f"{bad.message.rstrip('.')} (inside the arguments)"
    if _PYTHON.search(text):
        return "that is a Python literal (single quotes, True, None); use the JSON text of an object (json.dumps)"
    return "use the JSON text of an object (json.dumps)"
