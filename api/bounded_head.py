"""The head of a request, bounded in bytes, in fields and in time: uvicorn's fast parser sets no limit of its own.

httptools joins the pieces of a field by adding up bytes, so an endless one takes quadratic time and memory without
bound, of the only loop there is. Started with `uvicorn --http api.bounded_head:BoundedHead`.
"""

from __future__ import annotations

import asyncio
import json
from asyncio.events import TimerHandle
from http import HTTPStatus
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import envelope

HEAD_BYTES: Final = 32 * 1024
HEAD_FIELDS: Final = 100
# So long is read on, and thrown away, after an answer that ends the connection: to close at once would have the system
# reset it, and the client might never see the answer.
LINGER_SECONDS: Final = 1.0


class _TooMuch(Exception):
    """Raised within the parser, to stop it."""


class BoundedHead(HttpToolsProtocol):
    """One connection. Trailers are dropped: they came after the head was judged, and are no fields of it."""

    head_seconds = 10.0  # from the connection or the first byte of a request to the end of its head

    _timer: TimerHandle | None = None
    _linger: TimerHandle | None = None
    _in_head = True  # until the empty line, and again once the message is over
    _begun = False  # the first byte of a head has come
    _trailing = False  # a chunk has been announced, and none of its bytes have come: the last one's are trailers
    _ended_here = False  # the message before ends in the piece that is being read
    _unfinished = 0  # bytes of pieces that end within a head or trailers
    _size = 0  # bytes of the finished parts of a head
    _fields = 0
    _status = HTTPStatus.BAD_REQUEST

    # --- what asyncio calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over():
            return
        self._ended_here = False
        super().data_received(data)
        if self._is_over():
            return
        if self._in_head and (self._begun or not self._ended_here) and self._timer is None:
            self._start_clock()
        if (self._in_head or self._trailing) and not self._ended_here:
            self._unfinished += len(data)
            if self._unfinished > HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    # --- what the parser calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True
        self._size = self._fields = self._unfinished = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url), fields=0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value), fields=1)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._in_head, self._unfinished = False, 0
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._trailing, self._unfinished = True, 0

    def on_body(self, body: bytes) -> None:
        self._trailing, self._unfinished = False, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._ended_here = True, True
        self._begun = self._trailing = False
        self._unfinished = 0

    # --- the bounds -------------------------------------------------------------------------------------------------

    def _count(self, size: int, *, fields: int) -> None:
        self._size += size
        self._fields += fields
        if self._size > HEAD_BYTES or self._fields > HEAD_FIELDS:
            self._status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _TooMuch

    def _start_clock(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._time_is_up)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        self._timer = None
        if self._busy:
            self._start_clock()  # the answer before comes first
        elif self._begun:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()  # nothing was asked

    def _is_over(self) -> bool:
        """Whether nothing of this connection is read any more."""
        return self._linger is not None or self.transport.is_closing()

    @property
    def _busy(self) -> bool:
        """Whether an answer is on its way, which another must not be written into."""
        return self.cycle is not None and not self.cycle.response_complete

    # --- the answer -------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when its parser gives up, whatever for."""
        self._refuse(self._status)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer, and end the connection."""
        self._stop_clock()
        if self._busy or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(_answer(status, self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)


_REASONS: Final = {
    HTTPStatus.BAD_REQUEST: ("invalid_http", "This is no valid HTTP request."),
    HTTPStatus.REQUEST_TIMEOUT: ("request_timeout", "The head of the request did not come in its time. Send it again."),
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        "head_too_large",
        f"URL and headers may have {HEAD_BYTES:,} bytes and {HEAD_FIELDS} fields together; send fewer or shorter ones.",
    ),
}


def _answer(status: HTTPStatus, headers: list[tuple[bytes, bytes]]) -> bytes:
    code, message = _REASONS[status]
    body = json.dumps(envelope(message, kind="invalid_request_error", param=None, code=code)).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}".encode(),
        *(name + b": " + value for name, value in headers),
        b"content-type: application/json",
        b"content-length: " + str(len(body)).encode(),
        b"connection: close",
    ]
    return b"\r\n".join([*lines, b"", body])
