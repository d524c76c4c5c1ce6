"""Reads `gate.yaml`. Every fault has a line and a column. Pure; the command line carries this very module, too.

    assertions:
      - candidate.exact_match >= prod.exact_match - 0.01
      - assert: candidate.valid_json == 1
        title: every answer is JSON
      - {assert: candidate.loss < base.loss, confidently: true, if_present: base, least_items: 50}

The file may come from anybody: it is small, shallow, and has no anchors, tags or repeated keys, or it is refused
before it is composed.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import yaml

from .gate import Assertion, BadGate, Gate, Place, read_assertion

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 12
MAX_PARTS: Final = 4000  # keys, values and brackets: twice what the longest gate has
MAX_ASSERTIONS: Final = 200
MAX_TITLE: Final = 200

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A gate of Tunepool: what an evaluation must show before a model is promoted",
    "type": "object",
    "additionalProperties": False,
    "required": ["assertions"],
    "properties": {
        "version": {"const": 1, "description": "Of this format."},
        "assertions": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_ASSERTIONS,
            "items": {
                "oneOf": [
                    {"$ref": "#/$defs/comparison"},
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["assert"],
                        "properties": {
                            "assert": {"$ref": "#/$defs/comparison"},
                            "title": {"type": "string", "minLength": 1, "maxLength": MAX_TITLE},
                            "confidently": {
                                "type": "boolean",
                                "description": "Must hold for the whole 95 % interval, not only for the mean.",
                            },
                            "if_present": {
                                "type": "string",
                                "minLength": 1,
                                "maxLength": 100,
                                "description": "Judged only where the report has this subject.",
                            },
                            "least_items": {
                                "type": "integer",
                                "minimum": 1,
                                "maximum": 1_000_000,
                                "description": "Fewer items leave the assertion undecided.",
                            },
                        },
                    },
                ]
            },
        },
    },
    "$defs": {
        "comparison": {
            "type": "string",
            "minLength": 3,
            "maxLength": 1000,
            "description": "Two sides of numbers, subject.measure, + - * / ^ and functions; between them >= <= > < ==.",
            "examples": ["candidate.exact_match >= prod.exact_match - 0.01", "candidate.valid_json == 1"],
        }
    },
}
_OPTIONS: Final[dict[str, Any]] = SCHEMA["properties"]["assertions"]["items"]["oneOf"][1]["properties"]
_KINDS: Final[dict[str, tuple[type, str]]] = {
    "string": (str, "a text"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
}


def read_gate(data: bytes) -> Gate:
    """The gate in a file's bytes. Raises BadGate."""
    return Gate(_assertions(composed(data, what="gate")), hashlib.sha256(data).hexdigest())


def composed(data: bytes, *, what: str) -> yaml.Node:
    """The tree of a small YAML file, its nodes with their places. Raises BadGate; `what` is the file's name in it."""
    if len(data) > MAX_BYTES:
        raise BadGate(f"The {what} has {len(data):,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadGate(f"The {what} is not UTF-8: byte {error.start} is invalid.") from None
    try:
        _refuse_bombs(text, what)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        raise BadGate(f"The {what} is no YAML: {error.problem or error.context}.", **_where(where)) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise BadGate(f"The {what} is no YAML: {str(error).splitlines()[0][:200]}.") from None
    if root is None:
        raise BadGate(f"The {what} is empty.", line=1, column=1)
    return root


def _refuse_bombs(text: str, what: str) -> None:
    """Read events only, which takes no memory per level, and stop at the first that such a file has no use for."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise BadGate(f"A {what} has no anchors and aliases (& and *).", **_where(event.start_mark))
        if getattr(event, "tag", None):
            raise BadGate(f"A {what} has no tags (!).", **_where(event.start_mark))
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise BadGate(f"The {what} nests deeper than {MAX_DEPTH} levels.", **_where(event.start_mark))
        if count > MAX_PARTS:
            raise BadGate(f"The {what} has more than {MAX_PARTS:,} parts.", **_where(event.start_mark))


def _where(mark: Any) -> dict[str, Any]:
    return {} if mark is None else {"line": mark.line + 1, "column": mark.column + 1}


def _fault(message: str, node: yaml.Node) -> BadGate:
    return BadGate(message, **_where(node.start_mark))


def _assertions(root: yaml.Node) -> tuple[Assertion, ...]:
    entries = _entries(root, ("version", "assertions"), what="The gate")
    if "version" in entries and _plain(entries["version"]) != 1:
        raise _fault("'version' must be 1.", entries["version"])
    listed = entries.get("assertions")
    if listed is None:
        raise _fault("The gate needs 'assertions'.", root)
    if not isinstance(listed, yaml.SequenceNode) or not 1 <= len(listed.value) <= MAX_ASSERTIONS:
        raise _fault(f"'assertions' must be a list of 1 to {MAX_ASSERTIONS}.", listed)
    return tuple(_assertion(node) for node in listed.value)


def _assertion(node: yaml.Node) -> Assertion:
    if isinstance(node, yaml.ScalarNode):
        return _read(node, {})
    entries = _entries(node, tuple(_OPTIONS), what="An assertion")
    stated = entries.pop("assert", None)
    if stated is None:
        raise _fault("An assertion needs 'assert', the comparison.", node)
    return _read(stated, {name: _option(name, value) for name, value in entries.items()})


def _read(node: yaml.Node, options: dict[str, Any]) -> Assertion:
    text = _plain(node)
    if not isinstance(text, str):
        raise _fault("An assertion is a text, such as candidate.exact_match >= 0.9.", node)
    return read_assertion(text, Place(node.start_mark.line + 1, node.start_mark.column + 1), **options)


def _entries(node: yaml.Node, known: tuple[str, ...], *, what: str) -> dict[str, yaml.Node]:
    """The values of a mapping by their keys. Raises BadGate for a key that is unknown or stands twice."""
    if not isinstance(node, yaml.MappingNode):
        raise _fault(f"{what} must be a mapping with {', '.join(known)}.", node)
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if name not in known:
            raise _fault(f"{what} has no '{name[:100]}'; it may have {', '.join(known)}.", key)
        if name in entries:
            raise _fault(f"'{name}' stands twice.", key)
        entries[name] = value
    return entries


def _option(name: str, node: yaml.Node) -> Any:
    rule, value = _OPTIONS[name], _plain(node)
    kind, words = _KINDS[rule["type"]]
    if type(value) is not kind:
        raise _fault(f"'{name}' must be {words}.", node)
    size = len(value) if isinstance(value, str) else value
    least, most = rule.get("minLength", rule.get("minimum")), rule.get("maxLength", rule.get("maximum"))
    if least is not None and not least <= size <= most:
        raise _fault(f"'{name}' must have {least:,} to {most:,}{' characters' if kind is str else ''}.", node)
    return value


def _plain(node: yaml.Node) -> Any:
    """A scalar's value as YAML means it; None for anything else."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError):
        return None
