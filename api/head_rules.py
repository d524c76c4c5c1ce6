"""What RFC 9112 has a server refuse in a request's head, and the parser lets through. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, NamedTuple


class Fault(NamedTuple):
    """Why a request is refused, and how it is told."""

    status: HTTPStatus
    code: str
    message: str


# uri-host [ ":" port ] of RFC 3986, section 3.2.2; a name may be empty.
_NAME: Final = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){0,255}"
_ADDRESS: Final = rb"\[[0-9A-Fa-f:.]{2,45}\]"
HOST: Final = re.compile(rb"(?:%b|%b)(?::[0-9]{0,5})?" % (_ADDRESS, _NAME))

_HOST_ADVICE: Final = "Send exactly one, such as 'Host: localhost:8765'."


def fault(version: str, headers: Sequence[tuple[bytes, bytes]]) -> Fault | None:
    """What is wrong with a head, by sections 2.5, 3.2 and 6.1.

    Args:
        version: As the parser says it, such as `1.1`.
        headers: In their order, with names in small letters.
    """
    hosts = codings = 0
    host = coding = b""
    for name, value in headers:
        if name == b"host":
            hosts, host = hosts + 1, value
        elif name == b"transfer-encoding":
            codings, coding = codings + 1, value
    if version not in {"1.1", "1.0"}:
        return Fault(
            HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
            "http_version_not_supported",
            f"This service speaks HTTP/1.1, and the request is of HTTP/{version}. Send it as HTTP/1.1.",
        )
    if hosts > 1 or (not hosts and version == "1.1"):
        count = "has no Host header" if not hosts else f"has {hosts} Host headers"
        return Fault(HTTPStatus.BAD_REQUEST, "invalid_host", f"The request {count}. {_HOST_ADVICE}")
    if not HOST.fullmatch(host.strip()):
        shown = ascii(host[:100].decode("latin-1"))
        return Fault(HTTPStatus.BAD_REQUEST, "invalid_host", f"The Host header {shown} names no host. {_HOST_ADVICE}")
    if codings and (codings > 1 or coding.strip().lower() != b"chunked"):
        return Fault(
            HTTPStatus.NOT_IMPLEMENTED,
            "unsupported_transfer_coding",
            "The one Transfer-Encoding that is understood is 'chunked'. Send the body so, or with a Content-Length.",
        )
    if codings and version == "1.0":
        return Fault(
            HTTPStatus.BAD_REQUEST, "invalid_http", "HTTP/1.0 has no Transfer-Encoding. Send a Content-Length."
        )
    return None
