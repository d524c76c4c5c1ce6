"""JSON bodies, strictly: every bad form gets a sentence with field, value and remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared import strict_json
from shared.errors import Invalid, TooLarge

MAX_DEPTH: Final = 32
Model = TypeVar("Model", bound=BaseModel)


async def raw_body(request: Request) -> bytes:
    """The body's bytes, refused while they stream once there are too many. Raises Invalid, TooLarge."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Invalid(
            f"Content-Type must be application/json, not '{kind[:100]}'."
            " With curl, add -H 'Content-Type: application/json'.",
            param="Content-Type",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Invalid(
            "Compressed bodies are not accepted; send plain JSON.",
            param="Content-Encoding",
            code="unsupported_media_type",
        )
    limit: int = request.app.state.door.settings.max_body_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"The request body is larger than {limit} bytes.", code="request_too_large")
    return bytes(body)


RawBody = Annotated[bytes, Depends(raw_body)]


def parse(body: bytes, model: type[Model]) -> Model:
    """The body as `model`. Raises Invalid for the first field at fault, `param` in dotted form."""
    document = _document(body)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _first_fault(error.errors(include_url=False), document, model) from None


def _document(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise Invalid("The request body is empty; send a JSON object.", code="invalid_json")
    if body.startswith(b"\xef\xbb\xbf"):
        raise Invalid("The request body begins with a byte order mark; send UTF-8 without one.", code="invalid_json")
    try:
        document = strict_json.parse(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Invalid(f"The request body is not UTF-8: byte {error.start} is invalid.", code="invalid_json") from None
    except strict_json.BadJson as error:
        place = f" (column {error.column})" if error.column else ""
        message = "The request body is not accepted as JSON: " + error.message.replace("The line", "The body") + place
        raise Invalid(message, param=error.param or None, code="invalid_json") from None
    if not isinstance(document, dict):
        raise Invalid(f"The request body must be a JSON object, not {_kind(document)}.", code="invalid_json")
    _refuse_depth(document)
    return document


def _refuse_depth(document: Any) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise Invalid(f"The request body nests deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _children(item: Any) -> Sequence[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else ()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first_fault(found: list[ErrorDetails], document: dict[str, Any], model: type[BaseModel]) -> Invalid:
    path = _path(found[0], document)
    same = [error for error in found if _path(error, document) == path]
    # A union reports a fault for each member: an unknown key deep inside one outranks "should be 'auto'".
    first = min(same, key=lambda error: error["type"] in ("literal_error", "none_required"))
    param = ".".join(str(part) for part in path)
    if first["type"] == "missing":
        return Invalid(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Invalid(_unknown(path, document, model), param=param, code="unknown_parameter")
    wanted = list(dict.fromkeys(_wanted(error) for error in same))
    message = f"Invalid value for '{param}': {' or '.join(wanted)}, not {_shown(_value(document, path))}."
    return Invalid(message, param=param, code="invalid_value")


def _wanted(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if error["type"] in ("union_tag_invalid", "literal_error"):
        expected = context.get("expected_tags", context.get("expected", ""))
        return f"must be {expected}"
    return error["msg"].replace("Input should be", "must be").replace("Input should", "must")


def _path(error: ErrorDetails, document: Any) -> tuple[str | int, ...]:
    """The error's place in the body; pydantic's own names for union members are no part of it."""
    path: list[str | int] = []
    at: Any = document
    for part in error["loc"]:
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            path.append(part)
            at = at[part]  # type: ignore[index]  # `inside` has looked
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _value(document: Any, path: tuple[str | int, ...]) -> Any:
    at = document
    for part in path:
        at = at[part]
    return at


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(path: tuple[str | int, ...], document: Any, model: type[BaseModel]) -> str:
    name = str(path[-1])
    allowed = _fields_at(model, path[:-1])
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    known = f" Known here: {', '.join(sorted(allowed))}." if allowed else ""
    return f"Unknown parameter: '{'.'.join(str(part) for part in path)[:200]}'.{hint}{known}"


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Names of the fields that an object at `path` may have, read from the schema."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in path:
        node = _step(node, part, schema)
        if node is None:
            return []
    return list(_resolved(node, schema).get("properties", {}))


def _step(node: Any, part: str | int, schema: dict[str, Any]) -> Any:
    for option in _options(node, schema):
        found = option.get("items") if isinstance(part, int) else option.get("properties", {}).get(part)
        if found is not None:
            return found
    return None


def _options(node: Any, schema: dict[str, Any]) -> list[dict[str, Any]]:
    node = _reference(node, schema)
    branches = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
    return [node, *(option for branch in branches for option in _options(branch, schema))]


def _resolved(node: Any, schema: dict[str, Any]) -> dict[str, Any]:
    return next((option for option in _options(node, schema) if "properties" in option), {})


def _reference(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
