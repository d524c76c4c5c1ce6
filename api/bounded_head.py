"""Bounds requests and connections: size and time of a head, pace of bodies and answers, and the number of all.

uvicorn's fast parser sets no limit of its own. httptools joins the pieces of a field by adding up bytes, so an endless
one takes quadratic time and memory without bound, of the only loop there is. What a client does not send, or does not
take, costs it its connection. Started with `uvicorn --http api.bounded_head:BoundedHead`.
"""

from __future__ import annotations

import asyncio
import json
from asyncio.events import TimerHandle
from http import HTTPStatus
from typing import Any, Final, NoReturn, cast

from api import head_rules
from api.connection_limit import ConnectionLimit, usual_limit
from api.errors import envelope
from api.head_rules import Fault
from api.no_upgrade import NoUpgrade

HEAD_BYTES: Final = 32 * 1024
HEAD_FIELDS: Final = 100
# So long is read on, and thrown away, after an answer that ends the connection: to close at once would have the system
# reset it, and the client might never see the answer.
LINGER_SECONDS: Final = 1.0
# As much is thrown away at the most: whoever sends more than that after a refusal has to wait for nothing.
LINGER_BYTES: Final = 256 * 1024
# The least that comes of a body in `body_seconds`: a line of half a kilobyte a second passes.
BODY_BYTES: Final = 16 * 1024
WHOLE_BYTES: Final = 64 * 1024  # a piece of a body that is handed on as it came
# So much more than its body may a message take on its way: sizes and extensions of chunks are work for nobody.
FRAMING_BYTES: Final = 64 * 1024


class _Refused(Exception):
    """Raised within the parser, to stop it."""


class BoundedHead(NoUpgrade):
    """One connection. Trailers are dropped: they came after the head was judged, and are no fields of it."""

    head_seconds = 10.0  # from the connection or the first byte of a request to the end of its head
    body_seconds = 30.0  # without `BODY_BYTES` of a body, while we read
    answer_seconds = 60.0  # without taking anything of an answer
    limit: ConnectionLimit | None = None  # of the process

    _timer: TimerHandle | None = None
    _linger: TimerHandle | None = None
    _body_timer: TimerHandle | None = None
    _answer_timer: TimerHandle | None = None
    _body = 0  # bytes of a body since its clock was wound
    _counted = False  # among the connections of the process
    _in_head = True  # until the empty line, and again once the message is over
    _begun = False  # the first byte of a head has come
    _trailing = False  # a chunk has been announced, and none of its bytes have come: the last one's are trailers
    _ended_here = False  # the message before ends in the piece that is being read
    _unfinished = 0  # bytes of pieces that end within a head or trailers
    _size = 0  # bytes of the finished parts of a head
    _fields = 0
    _lingered = 0  # bytes that were thrown away since the answer that ends the connection
    _framing = 0  # bytes of a message behind the piece that its head ends in
    _content = 0  # of them and of that piece: bytes of its body
    _fault: Fault | None = None  # what its head is refused for

    # --- what asyncio calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._enter():
            self._end_with(_CROWDED)
            self.transport.close()  # at once: there is no room to linger
            return
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._linger, self._body_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        self._exit()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over():
            self._throw_away(len(data))
            return
        self._ended_here = False
        self._body += len(data)
        if not self._in_head:
            self._framing += len(data)
        super().data_received(data)
        if self._is_over():
            return
        if not self._in_head and self._framing > FRAMING_BYTES + self._content:
            self._end_body(_FRAMED)
            return
        if self._in_head and (self._begun or not self._ended_here) and self._timer is None:
            self._start_clock()
        if not self._in_head and self._body_timer is None:
            self._wind_body_clock()
        if (self._in_head or self._trailing) and not self._ended_here:
            self._unfinished += len(data)
            if self._unfinished > HEAD_BYTES:
                self._refuse(_HEAD_TOO_LARGE)

    # --- what the parser calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True
        self._size = self._fields = self._unfinished = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._size += len(url)
        if self._size > HEAD_BYTES:
            self._stop()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:  # for each field of every request: no call of ours in it
        self._size += len(name) + len(value)
        self._fields += 1
        if self._size > HEAD_BYTES or self._fields > HEAD_FIELDS:
            self._stop()
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._fault = head_rules.fault(self.parser.get_http_version(), self.headers)
        if self._fault is not None:
            raise _Refused
        self._stop_clock()
        self._in_head, self._unfinished = False, 0
        self._framing = self._content = 0
        self._connections.work(self, self._address)
        super().on_headers_complete()
        if (cycle := self.cycle) is not None and cycle.scope is self.scope:
            # For api/concurrency_limit.py: nobody waits for the answer any more.
            cast("dict[str, Any]", self.scope)["gone"] = lambda: cycle.disconnected

    def on_chunk_header(self) -> None:
        self._trailing, self._unfinished = True, 0

    def on_body(self, body: bytes) -> None:
        self._trailing, self._unfinished = False, 0
        self._content += len(body)
        held: bytes | bytearray = self.cycle.body
        if not held and len(body) >= WHOLE_BYTES:
            # Added to none, it stays the object that it is: in a growing array it would be copied, and again out of it.
            self.cycle.body = b""  # type: ignore[assignment]
        elif isinstance(held, bytes):  # small pieces added to bytes would copy all of them each time
            self.cycle.body = bytearray(held)
        super().on_body(body)

    def on_whole_message(self) -> None:
        super().on_whole_message()
        self._in_head, self._ended_here = True, True
        self._begun = self._trailing = False
        self._unfinished = 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if self._counted and not self._busy:  # answered before its body had come
            self._connections.wait(self, self._address)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._counted and self._in_head and not self.pipeline:
            self._connections.wait(self, self._address)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
        super().resume_writing()

    # --- the connections of the process -----------------------------------------------------------------------------

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _connections(self) -> ConnectionLimit:
        if type(self).limit is None:
            type(self).limit = usual_limit()  # by now the process may open as many files as it ever will
        limit = type(self).limit
        assert limit is not None
        return limit

    def _enter(self) -> bool:
        self._counted = self._connections.enter(self, self._address)
        return self._counted

    def _exit(self) -> None:
        if self._counted:
            self._counted = False
            self._connections.exit(self, self._address)

    def leave(self) -> None:
        """Make room for another; it is counted no more."""
        self._counted = False
        self.transport.abort()

    # --- the bounds -------------------------------------------------------------------------------------------------

    def _stop(self) -> NoReturn:
        self._fault = _HEAD_TOO_LARGE
        raise _Refused

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
            self._refuse(_SLOW_HEAD)
        else:
            self.transport.close()  # nothing was asked

    def _wind_body_clock(self) -> None:
        self._body = 0
        self._body_timer = self.loop.call_later(self.body_seconds, self._look_at_the_body)

    def _look_at_the_body(self) -> None:
        """End a request whose body does not come. While we do not read, it is not the client that is slow."""
        if self._body >= BODY_BYTES or self.flow.read_paused:
            self._wind_body_clock()
            return
        self._body_timer = None
        self._end_body(_SLOW_BODY)

    def _end_body(self, fault: Fault) -> None:
        """Refuse a request whose body is being read."""
        waiting = self.cycle is not None and not self.cycle.response_started and not self.pipeline
        if not waiting:
            self.transport.close()
            return
        self.cycle.disconnected = True  # whoever reads the body hears that its client has gone
        self.cycle.message_event.set()
        self._end_with(fault)

    def _is_over(self) -> bool:
        """Whether nothing of this connection is read any more."""
        return self._linger is not None or self.transport.is_closing()

    def _throw_away(self, count: int) -> None:
        """Count what comes after the end. To read on without bound would be work for nobody."""
        self._lingered += count
        if self._lingered > LINGER_BYTES:
            self.transport.pause_reading()

    @property
    def _busy(self) -> bool:
        """Whether an answer is on its way, which another must not be written into."""
        return self.cycle is not None and not self.cycle.response_complete

    # --- the answer -------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when its parser gives up, whatever for."""
        self._refuse(self._fault or _NO_HTTP)

    def _refuse(self, fault: Fault) -> None:
        """Answer, and end the connection."""
        self._stop_clock()
        if self.transport.is_closing():
            return
        if self._busy:
            self._end_busy(fault)
            return
        self._end_with(fault)

    def _end_busy(self, fault: Fault) -> None:
        """Within a body its own request is refused; within the head behind it, the answer before must stay whole."""
        if self._in_head:
            self.transport.close()
        else:
            self._end_body(fault)

    def _end_with(self, fault: Fault) -> None:
        self.transport.write(_answer(fault, self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)


_NO_HTTP: Final = Fault(HTTPStatus.BAD_REQUEST, "invalid_http", "This is no valid HTTP request.")
_SLOW_HEAD: Final = Fault(
    HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The head of the request did not come in its time. Send it again."
)
_SLOW_BODY: Final = Fault(
    HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The body of the request did not come in its time. Send it again."
)
_HEAD_TOO_LARGE: Final = Fault(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "head_too_large",
    f"URL and headers may have {HEAD_BYTES:,} bytes and {HEAD_FIELDS} fields together; send fewer or shorter ones.",
)
_FRAMED: Final = Fault(
    HTTPStatus.BAD_REQUEST,
    "invalid_http",
    f"The chunks of the body announce more than they bring: {FRAMING_BYTES:,} bytes beyond the body are the most. "
    "Send larger chunks, without extensions, or a Content-Length.",
)
_CROWDED: Final = Fault(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "too_many_connections",
    "This service holds as many connections as it can, or as many of this address. Close some, and try again.",
)


def _answer(fault: Fault, headers: list[tuple[bytes, bytes]]) -> bytes:
    ours = fault.status is HTTPStatus.SERVICE_UNAVAILABLE
    kind = "server_error" if ours else "invalid_request_error"
    body = json.dumps(envelope(fault.message, kind=kind, param=None, code=fault.code)).encode()
    lines = [
        f"HTTP/1.1 {fault.status.value} {fault.status.phrase}".encode(),
        *(name + b": " + value for name, value in headers),
        b"content-type: application/json",
        b"content-length: " + str(len(body)).encode(),
        b"connection: close",
        *([b"retry-after: 2", b"x-should-retry: true"] if ours else []),
    ]
    return b"\r\n".join([*lines, b"", body])
