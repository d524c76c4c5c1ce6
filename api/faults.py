"""Turns pydantic's errors into sentences for users: the field, its allowed values, the value given, the nearest name.

The sentence comes from the schema, not from pydantic's messages: a union reports one fault per member, and none of
them says what the field accepts as a whole.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from shared.errors import Invalid

MAX_PARAM_CHARACTERS: Final = 200
MAX_VALUE_CHARACTERS: Final = 80

Path = tuple[str | int, ...]

# A member of a union is chosen by one of its fields; pydantic names the union where that field is at fault.
_TAG_FAULTS: Final = ("union_tag_invalid", "union_tag_not_found")

# Values that other services take and this one never will: the reason is worth more than the list of others.
_REASONS: Final = {
    ("method.type", "reinforcement"): " Reinforcement fine-tuning is not offered.",
    ("type", "python"): " Graders that run code are not offered.",
    ("type", "score_model"): " Graders that ask another model are not offered.",
    ("type", "label_model"): " Graders that ask another model are not offered.",
    ("evaluation_metric", "cosine"): " It needs an embedding model, which is not offered.",
    ("evaluation_metric", "meteor"): " It needs the WordNet corpus, which is not carried.",
}


def first_fault(errors: Sequence[ErrorDetails], document: dict[str, Any], model: type[BaseModel]) -> Invalid:
    """The first field at fault, as an error whose `param` names it in dotted form."""
    path, error = _most_telling(errors, document)
    param = _dotted(path)
    if error["type"] in ("missing", "union_tag_not_found"):
        return Invalid(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return Invalid(_unknown(path, model), param=param, code="unknown_parameter")
    if error["loc"][-1] == "[key]":
        return Invalid(f"Invalid key '{param}': {_wanted_key(path, model)}.", param=param, code="invalid_value")
    value = _value(document, path)
    wanted = _wanted(path, model) or error["msg"].replace("Input should be ", "")
    reason = _reason(param, value)
    return Invalid(f"Invalid value for '{param}': must be {wanted}, not {_shown(value)}.{reason}", param=param)


def _reason(param: str, value: Any) -> str:
    if not isinstance(value, str):
        return ""
    return _REASONS.get((param, value)) or _REASONS.get((param.rpartition(".")[2], value), "")


def _most_telling(errors: Sequence[ErrorDetails], document: Any) -> tuple[Path, ErrorDetails]:
    """The deepest of the faults that a union reports for one value: that member came closest to fitting."""
    placed = [(_path(error, document), error) for error in errors]
    start = placed[0][0]
    same = [(path, error) for path, error in placed if path[: len(start)] == start]
    return max(
        same, key=lambda candidate: (len(candidate[0]), candidate[1]["type"] not in ("literal_error", "none_required"))
    )


def _path(error: ErrorDetails, document: Any) -> Path:
    """The fault's place in the body; pydantic's own names for union members are no part of it."""
    path: list[str | int] = []
    at: Any = document
    for part in error["loc"]:
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            path.append(part)
            at = at[part]  # type: ignore[index]  # the condition has looked
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"] in _TAG_FAULTS:
        path.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _dotted(path: Path) -> str:
    text = ".".join(str(part) for part in path)
    return text if len(text) <= MAX_PARAM_CHARACTERS else f"{text[: MAX_PARAM_CHARACTERS - 3]}..."


def _value(document: Any, path: Path) -> Any:
    at = document
    for part in path:
        at = at[part]
    return at


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 3]}..."


def _unknown(path: Path, model: type[BaseModel]) -> str:
    name = str(path[-1])
    allowed = sorted({field for option in _options_at(path[:-1], model) for field in option.get("properties", ())})
    near = difflib.get_close_matches(name[:100], allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    known = f" Known here: {', '.join(allowed)}." if allowed else ""
    return f"Unknown parameter: '{_dotted(path)}'.{hint}{known}"


# --- what the schema allows -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _options_at(path: Path, model: type[BaseModel]) -> list[dict[str, Any]]:
    """Every schema that a value at `path` may follow; none where the path leads nowhere."""
    schema = _schema(model)
    options = _options(schema, schema)
    for part in path:
        children = [child for option in options if (child := _child(option, part)) is not None]
        options = [option for child in children for option in _options(child, schema)]
    return options


def _child(option: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    if isinstance(part, int):
        return option.get("items")
    named: dict[str, Any] | None = option.get("properties", {}).get(part)
    others = [option.get("additionalProperties"), *option.get("patternProperties", {}).values()]
    return named or next((other for other in others if isinstance(other, dict)), None)


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    branches = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    return [option for branch in branches for option in _options(branch, schema)] or [node]


def _wanted(path: Path, model: type[BaseModel]) -> str:
    words = [word for option in _options_at(path, model) for word in _words(option)]
    return _either(list(dict.fromkeys(words)))


def _wanted_key(path: Path, model: type[BaseModel]) -> str:
    options = _options_at(path[:-1], model)
    named = [option["propertyNames"] for option in options if "propertyNames" in option]
    patterns = [{"pattern": pattern} for option in options for pattern in option.get("patternProperties", ())]
    return f"each key must be {_either([_text(rule) for rule in (*named, *patterns)])}"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, or {words[-1]}" if words else ""


def _words(option: dict[str, Any]) -> list[str]:
    """What one schema allows: `an integer from 1 to 50`, or the values that it names."""
    if "const" in option or "enum" in option:
        return [json.dumps(value) for value in option.get("enum", [option.get("const")])]
    say = _SAY.get(option.get("type", ""))
    return [] if say is None else [say(option)]


def _range(option: dict[str, Any]) -> str:
    low, high = option.get("minimum"), option.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if isinstance(low, float) else f" from {low} to {high}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {option[name]:g}" for name, word in bounds.items() if name in option]
    return f" {' and '.join(limits)}" if limits else ""


def _entries(option: dict[str, Any], kind: str) -> str:
    low, high = option.get(f"min{kind}"), option.get(f"max{kind}")
    if low and high is not None:
        return f" of {low} to {high} entries"
    if low:
        return f" of at least {low} entries"
    return "" if high is None else f" of at most {high} entries"


def _text(option: dict[str, Any]) -> str:
    if "pattern" in option:
        return f"a string that matches {option['pattern']}"
    low, high = option.get("minLength"), option.get("maxLength")
    if high is not None:
        return f"a string of {low or 0} to {high} characters"
    return "a string" if low is None else f"a string of at least {low} characters"


_SAY: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "integer": lambda option: f"an integer{_range(option)}",
    "number": lambda option: f"a number{_range(option)}",
    "string": _text,
    "boolean": lambda _: "true or false",
    "array": lambda option: f"a list{_entries(option, 'Items')}",
    "object": lambda option: f"an object{_entries(option, 'Properties')}",
    "null": lambda _: "null",
}
