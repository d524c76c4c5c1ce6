"""One line of JSON, parsed strictly: a key given twice, NaN and huge numbers are refused, with their place.

The standard library's C scanner parses; a second, slower walk over the text runs only for lines at fault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import msgspec

from shared.rows import slips

# Columns are looked for in the beginning of a line only, so that a hostile line cannot buy minutes of searching.
_SEARCHED_CHARS = 2**18
_SEARCHED_DEPTH = 100
_NAMED_CHARS = 200
_EXACT = 2.0**53  # beyond it a float does not say which integer it is
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)")
_SUSPECT_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_LAST_STEP = re.compile(r"(?:\.[^.\[\]]*|\[\d+\]|^[^.\[\]]*)$")


class BadJson(ValueError):
    """A line that is not one strict JSON value.

    Args:
        code: stable code, such as "invalid_json" or "duplicate_key".
        message: what is wrong and how to mend it.
        column: 1-based character column, or None where it could not be found.
        param: path of the value at fault, "" for the line as a whole.
    """

    def __init__(self, code: str, message: str, *, column: int | None = None, param: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.column = column
        self.param = param


def _nameable(path: str) -> str:
    """A path as a report can carry it: keys may be of any length, and hold what neither UTF-8 nor Postgres can."""
    plain = re.sub("[\0\ud800-\udfff]", "\ufffd", path[: _NAMED_CHARS + 1])
    return plain if len(path) <= _NAMED_CHARS else f"{plain[:_NAMED_CHARS]}…"


class JsonPlace(NamedTuple):
    """A key or a value in the text; `again` marks a key that its object already had."""

    path: str
    column: int
    token: str
    again: bool


class _Refused(ValueError):
    """Raised inside the scanner's hooks, which know the literal but not its place."""

    def __init__(self, code: str, literal: str) -> None:
        super().__init__(code)
        self.code = code
        self.literal = literal


def parse(text: str, *, long_integers: bool = False, whole_numbers: bool = False) -> Any:
    """Parse one JSON value.

    Args:
        long_integers: keep integers of up to 4,000 digits exactly; else 18 are the most.
        whole_numbers: `3.0` is the integer that it is to JSON Schema: R and pandas write it so.

    Raises:
        BadJson: with the column of the fault.
    """
    decoder = _EXACT_DECODER if long_integers else _WHOLE_DECODER if whole_numbers else _DECODER
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise _syntax_error(error) from None
    except _Refused as refused:
        raise _refusal(text, refused) from None
    except RecursionError:
        raise BadJson(
            "too_deeply_nested", "The line nests too deeply; an example needs fewer than 20 levels."
        ) from None
    if "\\u" in text and _SUSPECT_ESCAPE.search(text):
        _refuse_bad_escapes(text, value)
    return value


def columns(text: str, paths: Collection[str]) -> dict[str, int]:
    """Map each path to the 1-based column where it starts, or where its nearest existing parent does."""
    wanted = {step for path in paths for step in _with_parents(path)}
    column_of: dict[str, int] = {}
    for place in places(text):
        if place.path in wanted:
            column_of.setdefault(place.path, place.column)
            if len(column_of) == len(wanted):
                break
    return {path: next((column_of[step] for step in _with_parents(path) if step in column_of), 1) for path in paths}


def places(text: str) -> Iterator[JsonPlace]:
    """Walk over keys and values in order, with paths such as `messages[2].role`. Never recurses, never raises."""
    stack: list[_Frame] = []
    for match in _TOKEN.finditer(text, 0, _SEARCHED_CHARS):
        lexeme, column = match.group(), match.start() + 1
        top = stack[-1] if stack else None
        if lexeme in "}]":
            if stack:
                stack.pop()
        elif lexeme == ",":
            if top:
                top.advance()
        elif lexeme == ":":
            continue
        elif top and top.awaits_key:
            again = top.take_key(lexeme)
            yield JsonPlace(top.path(), column, lexeme, again)
        else:
            path = top.path() if top else ""
            yield JsonPlace(path, column, lexeme, again=False)
            if lexeme in "{[":
                stack.append(_Frame(path, is_object=lexeme == "{"))
                if len(stack) > _SEARCHED_DEPTH:
                    return


class _Frame:
    """An open object or array of the walk."""

    __slots__ = ("awaits_key", "index", "is_object", "key", "prefix", "seen")

    def __init__(self, prefix: str, *, is_object: bool) -> None:
        self.prefix = prefix
        self.is_object = is_object
        self.awaits_key = is_object
        self.index = 0
        self.key = ""
        self.seen: set[str] = set()

    def advance(self) -> None:
        self.index += 1
        self.awaits_key = self.is_object

    def take_key(self, token: str) -> bool:
        self.key = _unescaped(token)
        again = self.key in self.seen
        self.seen.add(self.key)
        self.awaits_key = False
        return again

    def path(self) -> str:
        if not self.is_object:
            return f"{self.prefix}[{self.index}]"
        return f"{self.prefix}.{self.key}" if self.prefix else self.key


def _unescaped(token: str) -> str:
    if "\\" not in token:
        return token.strip('"')
    try:
        return str(json.loads(token))
    except ValueError:
        return token.strip('"')


def _with_parents(path: str) -> Iterator[str]:
    yield path
    while path:
        path = _LAST_STEP.sub("", path)
        yield path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise _Refused("duplicate_key", "")
    return built


def _float(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise _Refused("number_out_of_range", literal)
    return number


def _whole(literal: str) -> float:
    number = _float(literal)
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _int(literal: str) -> int:
    # Beyond 64 bits the readers of a request's fields disagree.
    if len(literal) > 18:
        raise _Refused("number_out_of_range", literal)
    return int(literal)


def _long_int(literal: str) -> int:
    # Ids of 19 digits and more are common in arguments and schemas. Beyond 4,300 digits int() itself refuses.
    if len(literal) > 4000:
        raise _Refused("number_out_of_range", literal)
    return int(literal)


def _constant(literal: str) -> float:
    raise _Refused("not_a_number", literal)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)
_WHOLE_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_whole, parse_int=_int, parse_constant=_constant
)
_EXACT_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_long_int, parse_constant=_constant
)


def _syntax_error(error: json.JSONDecodeError) -> BadJson:
    column = error.pos + 1
    slip = slips.named(error.doc, error.pos)
    if slip is not None:
        message = slip
    elif error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        message = "The JSON stops before its end; write each example whole, on one line."
    elif error.msg == "Extra data":
        message = "Something follows the JSON object; put each example on a line of its own."
    elif error.msg.startswith("Invalid control character"):
        message = r"A raw control character stands inside a string; escape it (\n, \t)."
    else:
        message = f"Not valid JSON ({error.msg}); write one JSON object per line, as json.dumps does."
    return BadJson("invalid_json", message, column=column)


def _refusal(text: str, refused: _Refused) -> BadJson:
    place = _place_of(text, refused)
    param, column = (_nameable(place.path), place.column) if place else ("", None)
    literal = (
        refused.literal
        if len(refused.literal) <= 24
        else f"{refused.literal[:20]}… ({len(refused.literal):,} characters)"
    )
    message = {
        "duplicate_key": f"The key {param!r} stands twice in one object; keep one.",
        "not_a_number": f"{param or 'The line'} holds {literal}, which is not JSON; use a number, null, or a string.",
        "number_out_of_range": f"{param or 'The line'} holds the number {literal}, out of range; write it as a string.",
    }[refused.code]
    return BadJson(refused.code, message, column=column, param=param)


def _place_of(text: str, refused: _Refused) -> JsonPlace | None:
    if refused.code == "duplicate_key":
        return next((place for place in places(text) if place.again), None)
    return next((place for place in places(text) if place.token == refused.literal), None)


def _refuse_bad_escapes(text: str, value: Any) -> None:
    """Refuse NUL and lone surrogates: Postgres, tokenizers and UTF-8 itself cannot carry them."""
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        encoded = None
    except RecursionError:
        raise BadJson(
            "too_deeply_nested", "The line nests too deeply; an example needs fewer than 20 levels."
        ) from None
    if encoded is not None and b"\\u0000" not in encoded:
        return
    code, at = _first_bad_escape(text)
    if code is None:
        return
    path = _nameable(next((p.path for p in places(text) if p.column <= at < p.column + len(p.token)), ""))
    named = path or "The line"
    message = (
        rf"{named} holds the NUL character \u0000; remove it."
        if code == "nul_character"
        else f"{named} holds half of a surrogate pair; write the character itself, or both halves."
    )
    raise BadJson(code, message, column=at, param=path)


def _first_bad_escape(text: str) -> tuple[str | None, int]:
    high_at, high_end = 0, -1
    for match in _ESCAPE.finditer(text):
        unit = int(match.group(1), 16) if match.group(1) else -1
        is_low = 0xDC00 <= unit <= 0xDFFF
        if high_end >= 0 and not (is_low and match.start() == high_end):
            return "lone_surrogate", high_at
        if unit == 0:
            return "nul_character", match.start() + 1
        if is_low and high_end < 0:
            return "lone_surrogate", match.start() + 1
        high_at, high_end = (match.start() + 1, match.end()) if 0xD800 <= unit <= 0xDBFF else (0, -1)
    return ("lone_surrogate", high_at) if high_end >= 0 else (None, 0)
