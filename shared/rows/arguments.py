"""The arguments of a function call: JSON text of an object, read as it stands or out of a second encoding."""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any, Final

from shared.rows import strict_json
from shared.rows.findings import MOST_LEVELS, too_deep
from shared.rows.slips import is_python

_MOST_ENCODINGS = 4
_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*"')
_LONG_DECIMAL = re.compile(r"(?=[-\d.]{17})-?\d+\.\d+(?:[eE][-+]?\d+)?")
_LONG = re.compile(r"[0-9][0-9.]{15}")  # a quick look: texts without one hold no long decimal
_PYTHON = re.compile(r"^\s*\{\s*'|[:,\[]\s*(?:True|False|None)\b")


class BadArguments(ValueError):
    """Arguments that are no JSON object. The message is the end of a sentence: the reason and the remedy."""


def object_text(arguments: str) -> str:
    """The JSON text of the object that `arguments` mean: themselves, or the text inside them when encoded twice.

    OpenAI's own drone example encodes arguments twice, and OpenAI trains that file.

    Raises:
        BadArguments: no JSON, JSON of something else, or a value that readers disagree on.
    """
    if not arguments.strip():
        raise BadArguments("write {} where a call has no arguments")
    text = arguments
    for _ in range(_MOST_ENCODINGS):
        try:
            value = strict_json.parse(text, long_integers=True)
        except strict_json.BadJson as bad:
            raise BadArguments(_reason(text, bad)) from None
        if isinstance(value, dict):
            if too_deep(value):
                raise BadArguments(f"the object nests in more than {MOST_LEVELS} levels, write it flatter")
            return text
        if not isinstance(value, str):
            break
        text = value
    raise BadArguments("use the JSON text of an object (json.dumps)")


def is_rounded(arguments: str) -> bool:
    """Whether JSON text of arguments holds a decimal that a double of 64 bits does not hold, by its digits."""
    return bool(_LONG.search(arguments)) and _holds_rounded(_TEXTS.sub("", arguments))


def _holds_rounded(text: str) -> bool:
    return bool(_LONG.search(text)) and any(map(_is_another, _LONG_DECIMAL.findall(text)))


def _is_another(literal: str) -> bool:
    try:
        return Decimal(literal) != Decimal(repr(float(literal)))
    except ArithmeticError:  # an exponent beyond what Decimal holds
        return True


# Forms that hold objects in the row, and those whose calls or tools are texts: decimals are read as doubles of 64 bits.
_WITH_OBJECTS: Final = frozenset(
    {"arguments_as_object", "blocks", "contents", "langchain_messages", "logged", "results_as_objects"}
)
_WITH_TEXTS: Final = frozenset({"call_roles", "glaive", "listed_calls", "query_and_calls", "tagged_calls", "tools"})


def row_is_rounded(text: str, row: dict[str, Any], forms: Collection[str]) -> bool:
    """Whether a row holds a decimal, in calls, results or tools, that is written as another number.

    Args:
        text: the row's JSON.
        forms: what the row was read from (`shared.rows.foreign`).
    """
    if not _WITH_TEXTS.isdisjoint(forms):
        return _holds_rounded(text)
    if "conversations" in row and (isinstance(row.get("tools"), str) or '"function_call"' in text):
        return _holds_rounded(text)
    if not _WITH_OBJECTS.isdisjoint(forms):
        return is_rounded(text)
    listed = next((key for key in ("tools", "functions") if row.get(key)), None)
    # What stands before the first such key is no tool: mostly the conversation, most of the row.
    return listed is not None and is_rounded(text[max(0, text.find(f'"{listed}"')) :])


def slip_of(value: Any) -> str | None:
    """Why a text stands where a list or an object should, and the remedy: it is JSON, or Python's idea of it."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"[", "{", '"'}:
        return None
    if is_python(value):
        return "a Python literal as text (single quotes, True, None); write JSON, with json.dumps in place of str"
    try:
        text = strict_json.parse(value, long_integers=True)
        inner = strict_json.parse(text, long_integers=True) if isinstance(text, str) else text
    except strict_json.BadJson:
        return None
    if not isinstance(inner, list | dict):
        return None
    return "JSON within a text, so encoded twice; write the value itself, and call json.dumps once"


def calls_in(text: str) -> list[dict[str, Any]] | None:
    """The calls that a text holds as JSON: one object with name and arguments, or a list; None for other texts."""
    try:
        value = strict_json.parse(text, long_integers=True)
    except strict_json.BadJson:
        return None
    calls = value if isinstance(value, list) else [value]
    return calls if calls and all(map(_is_call, calls)) else None


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), str | dict)
    )


def is_encoded_again(arguments: str) -> bool:
    """Does the text begin as a JSON text does? The arguments of a checked row then hold their object inside."""
    return arguments.lstrip()[:1] == '"'


def plain(arguments: str) -> str:
    """`object_text` of arguments that the check has passed, quick for those encoded once."""
    return object_text(arguments) if is_encoded_again(arguments) else arguments


def _reason(text: str, bad: strict_json.BadJson) -> str:
    if bad.code != "invalid_json":
        return f"{bad.message.rstrip('.')} (inside the arguments)"
    if _PYTHON.search(text):  # also within: arguments are short
        return "that is a Python literal (single quotes, True, None); use the JSON text of an object (json.dumps)"
    return "use the JSON text of an object (json.dumps)"
