"""Answers that should be JSON: whether they are, whether a schema accepts them, which fields are right. Pure.

Schema and answer both come from strangers. A schema may refer to itself only by `#/$defs/NAME`; every keyword that is
applied is counted, patterns have a time limit, and a check that does not end soon is given up by name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import regex
from jsonschema import Draft202012Validator, SchemaError, validators
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from shared.rows import placeholders
from shared.rows.placeholders import BadPlaceholder, NoSuchVariable

MAX_SCHEMA_CHARACTERS: Final = 100_000
MAX_DEPTH: Final = 40
MAX_STEPS: Final = 20_000  # keywords applied to one answer
MAX_SECONDS: Final = 2.0
MAX_UNIQUE: Final = 2_000  # entries that `uniqueItems` compares with each other
MAX_LEAVES: Final = 10_000
PATTERN_SECONDS: Final = 0.1

_LOCAL: Final = re.compile(r"#(/\$defs/[A-Za-z0-9_.-]{1,100})?")
_NAMES: Final = frozenset({"properties", "$defs", "dependentSchemas"})  # their keys are names, not keywords
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
# They would look at patterns without a time limit, or follow names that nobody has checked.
_NOT_OFFERED: Final = frozenset(
    {"patternProperties", "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$id", "$anchor"}
)


class BadSchema(ValueError):
    """The schema cannot be used. Its words are the end of a sentence for the user."""


class TooMuch(ArithmeticError):
    """An answer is not judged in the time that it has. Its words are for the user."""


def search(pattern: Any, text: str) -> bool:
    """Whether a compiled pattern is in a text. Raises TooMuch."""
    try:
        return pattern.search(text, timeout=PATTERN_SECONDS, concurrent=True) is not None
    except (TimeoutError, MemoryError, RecursionError):
        raise TooMuch(f"The pattern did not end within {PATTERN_SECONDS:g} seconds.") from None


def compiled(pattern: str, *, ignore_case: bool = False) -> Any:
    """A pattern that `search` takes. Raises ValueError with the reason."""
    try:
        return regex.compile(pattern, flags=regex.IGNORECASE if ignore_case else 0)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise ValueError(str(error)[:200]) from None


# --- schemas ----------------------------------------------------------------------------------------------------------


class Schema:
    """A schema that has been read.

    Raises:
        BadSchema: it is none of draft 2020-12, too large, or uses what is not offered.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise BadSchema(f"has more than {MAX_SCHEMA_CHARACTERS:,} characters")
        _walk(schema, 0)
        try:
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            raise BadSchema(f"is no JSON Schema: {getattr(error, 'message', error)}"[:300]) from None
        self._budget = _Budget()
        checked = validators.extend(Draft202012Validator, _counted(self._budget))
        # A registry of its own: no reference is ever looked up outside of the schema.
        self._validator = checked(schema, registry=Registry())

    def accepts(self, value: Any) -> bool:
        """Raises TooMuch, BadSchema (a reference leads nowhere)."""
        self._budget.renew()
        try:
            return next(iter(self._validator.iter_errors(value)), None) is None
        except RecursionError:
            raise TooMuch("The schema goes round in a circle, or the answer is nested too deeply.") from None
        except Unresolvable as error:
            raise BadSchema(f"refers to '{error.ref}'"[:200] + ", which it does not hold") from None


def _walk(schema: Any, depth: int) -> None:
    """Raises BadSchema for a keyword that is not offered, wherever one can be applied."""
    if depth > MAX_DEPTH:
        raise BadSchema(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(schema, list):
        for part in schema:
            _walk(part, depth + 1)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _NOT_OFFERED:
            raise BadSchema(f"uses '{key}', which is not offered here")
        if key == "$ref" and not (isinstance(value, str) and _LOCAL.fullmatch(value)):
            raise BadSchema("refers to something else than '#' or '#/$defs/NAME'")
        if key == "pattern" and isinstance(value, str):
            _check_pattern(value)
        if key in _NAMES and isinstance(value, dict):
            for part in value.values():
                _walk(part, depth + 1)
        elif key not in _VALUES:
            _walk(value, depth + 1)


def _check_pattern(pattern: str) -> None:
    try:
        compiled(pattern)
    except ValueError as error:
        raise BadSchema(f"has a pattern that cannot be read: {error}") from None


class _Budget:
    """How much work one answer may cause."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._steps, self._until = 0, time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS or time.monotonic() > self._until:
            raise TooMuch(f"The schema needs more than {MAX_STEPS:,} steps or {MAX_SECONDS:g} seconds.")


Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]


def _counted(budget: _Budget) -> dict[str, Keyword]:
    own: dict[str, Keyword] = {"pattern": _pattern, "uniqueItems": _unique}

    def counting(keyword: Keyword) -> Keyword:
        def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            budget.spend()
            for error in keyword(validator, value, instance, schema) or ():
                budget.spend()
                yield error

        return apply

    return {name: counting(own.get(name, keyword)) for name, keyword in Draft202012Validator.VALIDATORS.items()}


def _pattern(_validator: Any, pattern: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not search(compiled(pattern), instance):
        yield ValidationError("does not match")


def _unique(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if wanted and isinstance(instance, list) and len(instance) > MAX_UNIQUE:
        raise TooMuch(f"uniqueItems compares at most {MAX_UNIQUE:,} entries.")
    yield from Draft202012Validator.VALIDATORS["uniqueItems"](validator, wanted, instance, schema) or ()


# --- fields -----------------------------------------------------------------------------------------------------------


def fields_right(answer: Any, reference: Any, *, fields: Sequence[str] | None) -> float | None:
    """Share of the reference's fields that the answer has with the same value; None: the reference has none of them.

    Args:
        fields: paths; None: every leaf of the reference, at most `MAX_LEAVES`. Raises TooMuch beyond.
    """
    wanted = _leaves(reference) if fields is None else _named(reference, fields)
    if not wanted:
        return None
    return sum(_same(_at(answer, path), value) for path, value in wanted) / len(wanted)


_MISSING: Final = object()
_Steps = tuple[str | int, ...]


def _leaves(value: Any) -> list[tuple[_Steps, Any]]:
    leaves: list[tuple[_Steps, Any]] = []
    waiting: list[tuple[_Steps, Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        if isinstance(here, dict) and here:
            waiting.extend(((*path, key), inner) for key, inner in here.items())
        elif isinstance(here, list) and here:
            waiting.extend(((*path, place), inner) for place, inner in enumerate(here))
        else:
            leaves.append((path, here))
        if len(leaves) + len(waiting) > MAX_LEAVES:
            raise TooMuch(f"The reference has more than {MAX_LEAVES:,} fields.")
    return leaves


def _named(reference: Any, fields: Sequence[str]) -> list[tuple[str, Any]]:
    named = []
    for path in fields:
        try:
            named.append((path, placeholders.reach(reference, path)))
        except (NoSuchVariable, BadPlaceholder):
            continue
    return named


def _at(value: Any, path: str | _Steps) -> Any:
    try:
        if isinstance(path, str):
            return placeholders.reach(value, path)
        for step in path:
            value = value[step]
    except (LookupError, TypeError, BadPlaceholder):
        return _MISSING
    return value


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON: true is not 1, and 1 is 1.0."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
