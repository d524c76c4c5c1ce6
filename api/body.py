"""Reads JSON bodies strictly, and writes JSON answers. Every fault gets a sentence with field, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request, Response
from pydantic import BaseModel, ValidationError

from api.faults import MAX_PARAM_CHARACTERS, first_fault
from shared.errors import Invalid, TooLarge
from shared.rows import strict_json
from shared.tenants.plain_text import acting, printable

JSON: Final = "application/json"
SHORT_BYTES: Final = 65_536  # as much as the server takes from a socket anyhow, whoever sends it
MAX_DEPTH: Final = 32
TEMPLATE: Final = "chat_template"
# Remedies of `strict_json` and `slips` for lines of a file.
_FOR_ROWS: Final = (
    "; write it as a string",
    "; put each example on a line of its own",
    "; write each example whole, on one line",
    "; write each row with json.dumps",
    "; write one JSON object per line, as json.dumps does",
    "; an example needs fewer than 20 levels",
)
_LENGTH: Final = re.compile(rb"[0-9]{1,9}")
_CODED: Final = frozenset({b"content-encoding", b"transfer-encoding"})
Model = TypeVar("Model", bound=BaseModel)


async def raw_body(request: Request) -> bytes:
    """The body's bytes, refused while they stream once there are too many. Raises Invalid, TooLarge."""
    headers = dict(request.scope["headers"])
    kind = _kind_of(headers)
    if kind != JSON:
        raise Invalid(
            f"Content-Type must be application/json, not '{kind[:100]}'."
            " With curl, add -H 'Content-Type: application/json'.",
            param="Content-Type",
            code="unsupported_media_type",
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
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


def is_short(request: Request) -> bool:
    """Whether the body is plain JSON of a stated few bytes: it may be read before the key is looked up."""
    headers = dict(request.scope["headers"])
    stated = _LENGTH.fullmatch(headers.get(b"content-length", b""))
    if stated is None or _kind_of(headers) != JSON or not _CODED.isdisjoint(headers):
        return False
    limit: int = request.app.state.door.settings.max_body_bytes
    return int(stated[0]) <= min(SHORT_BYTES, limit)


def _kind_of(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")


RawBody = Annotated[bytes, Depends(raw_body)]


def body_of(model: type[BaseModel], *, example: Any = None) -> dict[str, Any]:
    """For a route's `openapi_extra`: a body that the route parses itself. api/openapi_document.py adds the schema."""
    content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    return _required("application/json", content if example is None else {**content, "example": example})


def form_of(required: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    """For a route's `openapi_extra`: a form that the route reads as a stream."""
    schema = {"type": "object", "required": required, "properties": fields}
    return _required("multipart/form-data", {"schema": schema})


def _required(content_type: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {content_type: content}}}


def parse(body: bytes, model: type[Model], *, data: Collection[str] = ()) -> Model:
    """The body as `model`. Raises Invalid for the first field at fault, `param` in dotted form.

    Args:
        data: top fields whose texts are no names, labels or reasons: they may hold any character.
    """
    document = json_object(body)
    try:
        wanted = model.model_validate(document)
    except ValidationError as error:
        raise first_fault(error.errors(include_url=False), document, model) from None
    # In JSON such a character stands behind a backslash, or is none of ASCII; DEL alone may stand as it is.
    if b"\\" in body or b"\x7f" in body or not body.isascii():
        _refuse_acting_text({name: value for name, value in document.items() if name not in data})
    return wanted


def _refuse_acting_text(document: dict[str, Any]) -> None:
    """Names, labels and reasons are shown to others. Only a template is a program, in which a tab is a tab.

    Not a rule of the models: what was accepted before this rule is read by the same ones.
    """
    for path, character in acting(document):
        if path.rpartition(".")[2] != TEMPLATE:
            param = printable(path[:MAX_PARAM_CHARACTERS], kept="")
            raise Invalid(
                f"'{param}' holds the control character U+{ord(character):04X}; remove it.",
                param=param,
                code="control_character",
            )


def json_object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise Invalid("The request body is empty; send a JSON object.", code="invalid_json")
    if body.startswith(b"\xef\xbb\xbf"):
        raise Invalid("The request body begins with a byte order mark; send UTF-8 without one.", code="invalid_json")
    try:
        document = strict_json.parse(body.decode("utf-8"), whole_numbers=True)
    except UnicodeDecodeError as error:
        raise Invalid(f"The request body is not UTF-8: byte {error.start} is invalid.", code="invalid_json") from None
    except strict_json.BadJson as error:
        place = f" (column {error.column})" if error.column else ""
        sentence = _of_a_body(error.message)
        message = f"The request body is not accepted as JSON: {sentence}{place}"
        raise Invalid(message, param=error.param or None, code="invalid_json") from None
    if not isinstance(document, dict):
        raise Invalid(f"The request body must be a JSON object, not {_kind(document)}.", code="invalid_json")
    if body.count(b"{") + body.count(b"[") >= MAX_DEPTH:  # with fewer nothing nests so deep
        _refuse_depth(document)
    return document


def _of_a_body(message: str) -> str:
    """The same sentence about a body: what helps in a file of rows is left out."""
    for remedy in _FOR_ROWS:
        message = message.replace(remedy, "")
    return message.replace("The line", "The body").rstrip(".") + "."


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


def written(view: BaseModel, **headers: str) -> Response:
    """The view as JSON, without FastAPI, which would validate it again in another thread. Headers: `_` for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(view.model_dump_json(), media_type="application/json", headers=named)
